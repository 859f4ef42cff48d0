"""Rotary frequencies against the formulas of tests/golden/README.md, and which table row a token gets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cuplama.models.rope import ROPE_KEYS, Rope, RopeTables, RotationTables, Span, table_rows

THETA, DIM, CONTEXT, ORIGINAL = 10000.0, 16, 128, 32
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
    "proportional": {"partial_rotary_factor": 0.3},
    "ntk_alpha": {"alpha": 50.0},
}


def rope(kind: str, **changes: Any) -> Rope:
    settings = {**SETTINGS[kind], **changes}
    return Rope(kind, THETA, DIM, settings.pop("context", CONTEXT), settings.pop("original", ORIGINAL), settings)


def base(theta: float = THETA) -> list[float]:
    return [theta ** (-2 * i / DIM) for i in range(DIM // 2)]


def test_every_type_has_settings_here() -> None:
    assert set(SETTINGS) == set(ROPE_KEYS)


def check(found: tuple[Any, float], wanted: list[float], factor: float = 1.0) -> None:
    assert found[0].dtype == np.float32
    assert found[0].tolist() == pytest.approx(wanted, rel=2e-6)
    assert found[1] == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("length", [1, 32, 33, 1000])
def test_static_types(length: int) -> None:
    check(rope("default").frequencies(length), base())
    check(rope("linear").frequencies(length), [f / 4 for f in base()])
    check(rope("ntk_alpha").frequencies(length), base(THETA * 50 ** (DIM / (DIM - 2))))


def test_proportional_rotates_the_fastest_part_of_the_whole_head() -> None:
    """int(0.3 * 16 // 2) = 2 pairs of 8, at the frequencies that they have in a whole head."""
    check(rope("proportional").frequencies(1), [*base()[:2], *[0.0] * 6])
    check(rope("proportional", factor=8.0).frequencies(1), [*(f / 8 for f in base()[:2]), *[0.0] * 6])
    check(rope("proportional", partial_rotary_factor=1.0).frequencies(1), base())


def test_dynamic_grows_its_base_beyond_the_context() -> None:
    r = rope("dynamic", context=32)
    for length in (1, 31, 32):
        check(r.frequencies(length), base())
    for length in (33, 64, 128):
        stretch = 4.0 * length / 32 - 3
        check(r.frequencies(length), base(THETA * stretch ** (DIM / (DIM - 2))))


def test_llama3_by_wavelength() -> None:
    wanted = []
    for f in base():
        wavelength = 2 * math.pi / f
        if wavelength < ORIGINAL / 4:
            wanted.append(f)
        elif wavelength > ORIGINAL / 1:
            wanted.append(f / 8)
        else:
            t = (ORIGINAL / wavelength - 1) / (4 - 1)
            wanted.append((1 - t) * f / 8 + t * f)
    check(rope("llama3").frequencies(500), wanted)
    assert len({w / f for w, f in zip(wanted, base(), strict=True)}) == 3  # all three cases occur


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": None}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"beta_fast": 0, "beta_slow": None}, 0.1 * math.log(4) + 1),
        ({"factor": None, "context": 4 * ORIGINAL}, 0.1 * math.log(4) + 1),
        ({"truncate": False}, 0.1 * math.log(4) + 1),
        ({"truncate": False, "original": 10**5}, 0.1 * math.log(4) + 1),
        ({"original": 10**9, "beta_fast": 1e6}, 0.1 * math.log(4) + 1),  # the last dim bounds the ramp
        ({"original": 10**5, "beta_fast": 64, "beta_slow": 2000}, 0.1 * math.log(4) + 1),
        ({"truncate": False, "original": 10**4, "beta_fast": 8, "beta_slow": 8}, 0.1 * math.log(4) + 1),  # a step
        ({"factor": 1.0}, 1.0),
        ({"factor": 1.5}, 0.1 * math.log(1.5) + 1),
    ],
)
def test_yarn(changes: dict[str, Any], factor: float) -> None:
    def turning_point(rotations: float) -> float:
        original = changes.get("original", ORIGINAL)
        return DIM * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = turning_point(changes.get("beta_fast") or 32), turning_point(changes.get("beta_slow") or 1)
    if changes.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, DIM - 1)
    ramp = [min(max((i - low) / (high - low or 0.001), 0), 1) for i in range(DIM // 2)]
    stretch = changes.get("factor") or 4
    wanted = [r * f / stretch + (1 - r) * f for r, f in zip(ramp, base(), strict=True)]
    check(rope("yarn", **changes).frequencies(7), wanted, factor)


def test_longrope_changes_sets_beyond_the_original_context() -> None:
    r = rope("longrope")
    factor = math.sqrt(1 + math.log(CONTEXT / ORIGINAL) / math.log(ORIGINAL))
    for length, name in ((1, "short_factor"), (32, "short_factor"), (33, "long_factor"), (128, "long_factor")):
        wanted = [f / s for f, s in zip(base(), SETTINGS["longrope"][name], strict=True)]
        check(r.frequencies(length), wanted, factor)
    assert [r.regime(n) for n in (1, 32, 33)] == [0, 0, 1]
    assert rope("longrope", attention_factor=1.25).frequencies(1)[1] == 1.25
    assert rope("longrope", factor=1.0).frequencies(1)[1] == 1.0
    assert rope("longrope", factor=1.5).frequencies(1)[1] == pytest.approx(math.sqrt(1 + math.log(1.5) / math.log(32)))
    assert rope("longrope", factor=8.0).frequencies(1)[1] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(32)))


@pytest.mark.parametrize("kind", SETTINGS)
def test_table_rows(kind: str) -> None:
    """Whatever the pass, a token's row holds the angles of its position under the frequencies of its total length."""
    r = rope(kind, context=ORIGINAL if kind == "dynamic" else CONTEXT)
    tables = RopeTables(r, 96)
    passes = [
        [Span(0, 1, 1)],
        [Span(0, 32, 32)],
        [Span(0, 33, 33)],
        [Span(0, 96, 96)],
        [Span(95, 1, 96)],
        [Span(0, 10, 50), Span(31, 1, 32), Span(32, 1, 33), Span(0, 5, 5)],
        [Span(10, 40, 50)],
        [Span(40, 1, 41), Span(60, 1, 61)],
    ]
    for spans in passes:
        cos, sin, rows = tables.lookup(spans)
        assert rows.dtype == np.int32
        assert cos.dtype == sin.dtype == np.float32
        at = 0
        for span in spans:
            frequencies, factor = r.frequencies(span.total)
            angles = np.arange(span.start, span.start + span.count, dtype=np.float32)[:, None] * frequencies
            here = rows[at : at + span.count]
            assert np.allclose(cos[here], np.cos(angles) * factor, atol=1e-6)
            assert np.allclose(sin[here], np.sin(angles) * factor, atol=1e-6)
            at += span.count
        assert at == len(rows)


def test_decoding_needs_no_tables_of_its_own() -> None:
    for kind in SETTINGS:
        tables = RopeTables(rope(kind, context=ORIGINAL), 96)
        for n in (1, 32, 33, 96):
            cos, sin, _ = tables.lookup([Span(n - 1, 1, n), Span(0, 1, 1)])
            assert cos is tables.cos
            assert sin is tables.sin


def test_stable_steps_end_where_the_regime_does() -> None:
    """The last of ``length`` tokens is not cached yet; each step feeds one and draws the next."""
    r = rope("longrope")
    for length in range(1, 34):
        steps = r.stable_steps(length)
        assert all(r.regime(length + i) == r.regime(length - 1) for i in range(steps))
        assert r.regime(length + steps) != r.regime(length - 1)
    assert r.stable_steps(33) == 0
    assert r.stable_steps(34) > 10**6
    assert rope("default").stable_steps(10**6) > 10**6


@pytest.mark.parametrize("low", [0.5, 2.0])
def test_llama3_bounds_are_parts_of_the_original_context(low: float) -> None:
    found = rope("llama3", low_freq_factor=low).frequencies(1)[0]
    scaled = [f / 8 for f in base()]
    assert [float(x) == pytest.approx(s) for x, s in zip(found, scaled, strict=True)] == [
        2 * math.pi / f > ORIGINAL / low for f in base()
    ]


@pytest.mark.parametrize("kind", SETTINGS)
def test_tables_have_the_rows_that_are_planned(kind: str) -> None:
    r = rope(kind, context=ORIGINAL)
    for positions in (1, 31, 32, 33, 96):
        rows = table_rows(r, positions)
        assert rows == (2 * positions if kind == "longrope" and positions > 32 else positions)
        tables = RopeTables(r, positions)
        assert tables.cos.shape == tables.sin.shape == (rows, DIM // 2)


def test_dynamic_prompts_bring_tables_only_beyond_the_context() -> None:
    """A prompt within it, and one token after what is cached, find their rows in the common tables."""
    tables = RopeTables(rope("dynamic", context=32), 96)
    for spans, own in (
        ([Span(0, 32, 32)], False),
        ([Span(0, 33, 33)], True),
        ([Span(0, 8, 33)], True),
        ([Span(32, 1, 33)], False),
        ([Span(32, 1, 33), Span(31, 2, 33)], True),
    ):
        assert (tables.lookup(spans)[0] is not tables.cos) == own


def test_one_row_number_serves_the_tables_of_all_rotations() -> None:
    one, other = rope("default"), Rope("linear", 77.0, 8, CONTEXT, ORIGINAL, {"factor": 2.0})
    both, spans = RotationTables({"rope": one, "rope1": other}, 48), [Span(0, 3, 3), Span(40, 2, 42)]
    assert {name: table.shape for name, table in both.arrays.items()} == {
        "rope.cos": (48, 8), "rope.sin": (48, 8), "rope1.cos": (48, 4), "rope1.sin": (48, 4)
    }  # fmt: skip
    assert np.array_equal(both.arrays["rope1.sin"], RopeTables(other, 48).sin)
    for tables in (both, RotationTables({}, 48)):
        own, rows = tables.lookup(spans)
        assert (len(own), rows.tolist(), rows.dtype.name) == (0, [0, 1, 2, 40, 41], "int32")
    assert RotationTables({}, 48).arrays == {}
