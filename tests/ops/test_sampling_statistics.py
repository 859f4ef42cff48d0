"""The sampler draws what it says: known answers of Philox, frequencies against probabilities, rows on their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.ops.sampling import gumbel, philox, sample

_LOGITS = np.array([2.0, 1.5, 1.5, 0.3, 0.0, -0.4, -1.0, -3.0, -np.inf, 1.0, 0.9, -6.0], np.float32)
_DRAWS = 6_000


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # of the authors' Random123 distribution, kat_vectors
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, answer: str) -> None:
    words = philox(np.array(counter, np.uint32), key)
    assert " ".join(f"{w:08x}" for w in words) == answer


def test_gumbel_moments() -> None:
    """Mean gamma = 0.5772 and variance pi^2 / 6, within 5 standard errors."""
    g = gumbel(np.arange(200_000), seed=7, position=3).astype(np.float64)
    assert abs(g.mean() - np.euler_gamma) < 5 * np.sqrt(np.pi**2 / 6 / g.size)
    assert abs(g.var() - np.pi**2 / 6) < 5 * np.sqrt(4.4 * (np.pi**2 / 6) ** 2 / g.size)  # kurtosis 5.4


def _settings(rows: int, **given: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 1,
        "positions": 0,
        **given,
    }
    dtypes = {"top_k": np.int32, "positions": np.int32, "seed": np.uint64}
    return {k: np.broadcast_to(np.asarray(v, dtypes.get(k, np.float32)), rows).copy() for k, v in settings.items()}


def _draw(logits: np.ndarray[Any, Any], **given: Any) -> np.ndarray[Any, Any]:
    tokens: np.ndarray[Any, Any] = sample.reference(logits, **_settings(len(logits), **given))
    return tokens


def _probabilities(temperature: float, keep: list[int] | None) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        weight = np.exp(_LOGITS.astype(np.float64) / temperature)
    if keep is not None:
        weight[[i for i in range(len(weight)) if i not in keep]] = 0
    return np.asarray(weight / weight.sum())


@pytest.mark.parametrize(
    ("settings", "keep"),
    [
        ({}, None),
        ({"temperature": 0.5}, None),
        ({"temperature": 3.0}, None),
        ({"top_k": 4}, [0, 1, 2, 9]),
        ({"top_k": 2}, [0, 1, 2]),  # the second and third are equal: both stay
        ({"top_k": 99}, None),
        ({"top_p": 0.3}, [0, 1, 2]),  # 0.296 and then 0.179 twice: 0.296 < 0.3
        ({"top_p": 0.29}, [0]),
        ({"top_p": 0.0}, [0]),
        ({"min_p": 0.35}, [0, 1, 2, 9]),  # exp(-1) = 0.37, exp(-1.1) = 0.33
        ({"top_k": 4, "top_p": 0.79}, [0, 1, 2]),  # of the four kept, the first three have 0.86
        ({"top_p": 0.95, "min_p": 0.2, "temperature": 2.0}, None),
    ],
)
def test_frequencies(settings: dict[str, float], keep: list[int] | None) -> None:
    """Chi-square of the counts against the probabilities, one draw at each position."""
    temperature = float(settings.get("temperature", 1.0))
    if settings.get("min_p") == 0.2:
        p = _probabilities(temperature, None)
        order = np.argsort(-p, kind="stable")
        above = np.array([p[p > p[i]].sum() for i in range(len(p))])
        keep = [int(i) for i in order if above[i] < 0.95 and p[i] >= 0.2 * p.max()]
    p = _probabilities(temperature, keep)
    tokens = _draw(np.broadcast_to(_LOGITS, (_DRAWS, _LOGITS.size)), **settings, positions=np.arange(_DRAWS))
    counts = np.bincount(tokens, minlength=_LOGITS.size)
    assert (counts[p == 0] == 0).all()
    wanted = _DRAWS * p
    common = wanted >= 5
    rest = np.array([counts[~common].sum(), wanted[~common].sum()])
    chi2 = ((counts[common] - wanted[common]) ** 2 / wanted[common]).sum() + (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    freedom = int(common.sum())
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(5)
    logits = (3 * rng.standard_normal((6, 500))).astype(np.float32)
    given: dict[str, Any] = {
        "temperature": np.array([0, 1, 0.7, 1, 1.5, 1]), "top_k": np.array([0, 0, 9, 5, 0, 400]),
        "top_p": np.array([1, 1, 0.9, 1, 0.5, 0.99]), "min_p": np.array([0, 0, 0, 0.1, 0, 0.01]),
        "seed": np.arange(6) * 2**60, "positions": np.arange(6),
    }  # fmt: skip
    together = _draw(logits, **given)
    for i in range(6):
        assert _draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()})[0] == together[i]
    order = rng.permutation(6)
    assert np.array_equal(_draw(logits[order], **{k: v[order] for k, v in given.items()}), together[order])


def test_neighbouring_positions_and_seeds_are_unrelated() -> None:
    """With equal logits, the tokens of successive positions (or seeds) form pairs as often as chance has it."""
    flat = np.zeros((_DRAWS, 8), np.float32)
    for over in ("positions", "seed"):
        tokens = _draw(flat, **{over: np.arange(_DRAWS)})
        pairs = np.bincount(8 * tokens[:-1] + tokens[1:], minlength=64)
        wanted = (_DRAWS - 1) / 64
        assert ((pairs - wanted) ** 2 / wanted).sum() < 63 + 4 * np.sqrt(2 * 63)
