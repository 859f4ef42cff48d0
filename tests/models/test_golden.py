"""The reference backend against what transformers computed in float32 (tests/golden/README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama import Model
from cuplama.models.config import load_config
from cuplama.models.families import FAMILIES
from tests.engine.feeding import last_logits, release
from tests.paths import GOLDEN
from tools.golden_figures import Golden, figures_16_bit, met_16_bit

CASES = sorted(p for p in (GOLDEN).iterdir() if (p / "meta.json").exists())
TOLERANCE = 2e-4
SPELLED = [p for p in CASES if (p / "config.v4.json").exists()]
Array = np.ndarray[Any, Any]


def load(case: Path, dtype: str = "float32", cache_tokens: int | None = None) -> Model:
    context = json.loads((case / "meta.json").read_text())["context"]
    return cuplama.load(case, device="numpy", dtype=dtype, context=context, cache_tokens=cache_tokens)


class Case(Golden):
    def __init__(self, case: Path) -> None:
        super().__init__(case)
        assert list(map(len, self.prompts)) == self.meta["prompt_lengths"] == [1, 9, 29, 45]
        self.model = load(case)


@pytest.fixture(scope="module", params=CASES, ids=lambda p: p.name)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    found = Case(request.param)
    with found.model:
        yield found


def difference(a: Array, b: Array) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def test_there_is_a_case_for_every_family() -> None:
    assert {load_config(p).family.model_type for p in CASES} == {family.model_type for family in FAMILIES.values()}


def test_logits(case: Case) -> None:
    for prompt, wanted in zip(case.prompts, case.logits, strict=True):
        found = case.model.logits(prompt)
        assert found.dtype == np.float32
        assert difference(found, wanted) <= TOLERANCE


def test_greedy_tokens_one_prompt_at_a_time(case: Case) -> None:
    for prompt, wanted in zip(case.prompts, case.greedy, strict=True):
        done = case.model.generate(prompt, max_tokens=len(wanted), temperature=0, ignore_eos=True)
        assert done.tokens == wanted
        assert done.finish_reason == "length"


def test_greedy_tokens_as_one_ragged_batch(case: Case) -> None:
    done = load_batch(case)
    assert done == case.greedy


def load_batch(case: Case) -> list[list[int]]:
    """All prompts in one wave: the cache holds them all at full length."""
    folder = case.model.folder
    with load(folder, cache_tokens=len(case.prompts) * case.model.context) as model:
        done = model.generate(case.prompts, max_tokens=len(case.greedy[0]), temperature=0, ignore_eos=True)
    return [c.tokens for c in done]


def decode_steps(model: Model, prompts: list[list[int]], greedy: list[list[int]]) -> list[Array]:
    """The logits of every step when the golden tokens are fed one by one after the prompts, [steps, vocab] each."""
    from cuplama.engine.sequence import SequenceState

    engine, params = model.engine, model.params(max_tokens=None)
    sequences = [SequenceState(p, params, frozenset()) for p in prompts]
    rows: list[list[Array]] = [[] for _ in prompts]
    try:
        for step in range(len(greedy[0])):
            logits = last_logits(engine, sequences)
            for i, s in enumerate(sequences):
                rows[i].append(logits[i])
                s.tokens.append(greedy[i][step])
    finally:
        release(engine.cache, sequences)
    return [np.stack(r) for r in rows]


def test_logits_of_decoding_steps(case: Case) -> None:
    for prompt, greedy, wanted in zip(case.prompts, case.greedy, case.steps, strict=True):
        (found,) = decode_steps(case.model, [prompt], [greedy])
        assert difference(found, wanted) <= TOLERANCE


def test_logits_of_decoding_steps_in_a_ragged_batch(case: Case) -> None:
    with load(case.model.folder, cache_tokens=len(case.prompts) * case.model.context) as model:
        found = decode_steps(model, case.prompts, case.greedy)
    assert max(map(difference, found, case.steps)) <= TOLERANCE


def test_token_by_token_equals_one_piece(case: Case) -> None:
    """The longest prompt fed token by token; for dynamic RoPE only as far as its frequencies do not change."""
    prompt, wanted = case.prompts[-1], case.logits[-1]
    rope = case.model.config.layers[0].rope
    if rope is not None and rope.type == "dynamic":
        prompt = prompt[: rope.context]
        wanted = case.model.logits(prompt)
    elif rope is not None and rope.regime(len(prompt)):
        # Beyond the original context all positions of one piece have the long factors, those of a shorter one do not.
        wanted = np.stack([case.model.logits(prompt[: n + 1])[-1] for n in range(len(prompt))])
    (found,) = decode_steps(case.model, [prompt[:1]], [[*prompt[1:], 0]])
    assert difference(found, wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(16, marks=pytest.mark.slow)]
)
def test_chunked_prefill_equals_one_piece(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.model.backend, "prefill_chunk", chunk)
    prompt, wanted = case.prompts[-1], case.logits[-1]
    assert difference(case.model.logits(prompt), wanted) <= TOLERANCE
    with load(case.model.folder, cache_tokens=len(case.prompts) * case.model.context) as model:
        monkeypatch.setattr(model.backend, "prefill_chunk", chunk)
        found = model.generate(case.prompts, max_tokens=8, temperature=0, ignore_eos=True)
    assert [c.tokens for c in found] == [g[:8] for g in case.greedy]


def test_cache_for_one_sequence_runs_a_batch_in_waves(case: Case) -> None:
    assert case.model.engine.cache.pages * 64 < len(case.prompts) * case.model.context
    done = case.model.generate(case.prompts, max_tokens=None, temperature=0, ignore_eos=True)
    assert [c.tokens[:24] for c in done] == case.greedy
    assert [len(p) + len(c.tokens) for p, c in zip(case.prompts, done, strict=True)] == [case.model.context] * 4
    assert case.model.engine.cache.free == case.model.engine.cache.pages


@pytest.mark.parametrize("spelling", ["config.v4.json", "config.v5.json"])
@pytest.mark.parametrize("folder", SPELLED, ids=lambda p: p.name)
def test_both_spellings_of_the_rope_settings(folder: Path, spelling: str, tmp_path: Path) -> None:
    for file in ("model.safetensors", "generation_config.json", "meta.json"):
        shutil.copy(folder / file, tmp_path / file)
    shutil.copy(folder / spelling, tmp_path / "config.json")
    golden = Golden(folder)
    with load(tmp_path) as model:
        for prompt, wanted, greedy in zip(golden.prompts, golden.logits, golden.greedy, strict=True):
            assert difference(model.logits(prompt), wanted) <= TOLERANCE
            assert model.generate(prompt, max_tokens=24, temperature=0, ignore_eos=True).tokens == greedy


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_sixteen_bits_stay_as_close_to_float32_as_transformers(folder: Path, dtype: str) -> None:
    golden = Golden(folder)
    with golden.load("numpy", dtype) as model:
        found = figures_16_bit(golden, model, dtype)
    assert met_16_bit(found), f"{golden.name} {dtype}: {found}"
    assert found["compared"] > 0.5
