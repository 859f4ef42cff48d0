"""Whole models as the GPU runs them, on the emulator: planned launches, fused nodes, captured steps, ragged batches.

The kernels' own text computes every family's golden tokens. What is missing here is the hardware: timing, streams and
the order of launches that overlap.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from tests.engine.test_joining import assert_same, follow
from tests.engine.test_prefill import continued
from tests.fakes import FakeGpu
from tests.paths import GOLDEN
from tests.tiny import assert_all_pages_free
from tools.divergence import compared, divergence, kl
from tools.golden_figures import Golden
from tools.runs import in_one_piece, step_by_step, stepwise

CASES = sorted((GOLDEN).iterdir())


def _load(case: Path, dtype: str, kv_cache_dtype: str = "auto") -> tuple[Model, Any, dict[str, Any]]:
    meta = json.loads((case / "meta.json").read_text())
    config = load_config(case)
    backend = CudaBackend(dtype, gpu=FakeGpu(emulate=True))
    weights = {name: backend.load_weight(w) for name, w in load_weights(case, config).items()}
    engine = Engine(backend, config, weights, meta["context"], 2 * meta["context"], kv_cache_dtype)
    return Model(case, config, None, engine, Settings()), np.load(case / "golden.npz"), meta


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_golden_tokens(case: Path) -> None:
    """A middling prompt, one that crosses the original context while decoding, one that begins beyond it; a batch."""
    model, golden, _ = _load(case, "f32")
    greedy: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    for j, count in ((1, 4), (2, 6), (3, 3)):
        done = model.generate(golden[f"prompt_{j}"].tolist(), max_tokens=count, **greedy)
        assert done.tokens == golden[f"greedy_{j}"].tolist()[:count]
    batch = model.generate([golden[f"prompt_{j}"].tolist() for j in (1, 0)], max_tokens=4, **greedy)
    assert [c.tokens for c in batch] == [golden[f"greedy_{j}"].tolist()[:4] for j in (1, 0)]


@pytest.mark.parametrize("case", CASES[::3], ids=lambda p: p.name)
@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_16_bit_logits(case: Path, dtype: str, name: str) -> None:
    """In one piece and by fused steps. transformers' divergence is a mean over more positions, hence the factor."""
    (model, _, _), golden = _load(case, dtype), Golden(case)
    prompt, wanted = golden.prompts[1], golden.rows[1]
    for found in (in_one_piece(model, prompt), step_by_step(model, prompt)):
        rows = divergence(wanted, found)[: compared(golden.meta, name, golden.prompts)[1]]
        assert rows.mean() <= 2 * golden.meta["kl"][name]


@pytest.mark.parametrize("name", ["llama3-gqa", "gpt2-char", "qwen3", "mistral-window"])
def test_an_fp8_cache_gives_what_numpy_gives(name: str) -> None:
    """In float32, prompts and steps: keys and values are rounded to the same numbers, so the tokens are the same."""
    case = next(c for c in CASES if c.name == name)
    model, golden, meta = _load(case, "f32", "fp8")
    plain = cuplama.load(case, device="numpy", context=meta["context"], kv_cache_dtype="fp8")
    prompt = golden["prompt_1"].tolist()
    whole, steps, wanted = model.logits(prompt), stepwise(model, prompt), plain.logits(prompt)
    for logits in (whole, steps):
        np.testing.assert_allclose(logits, wanted, atol=1e-3, rtol=0)
    assert np.abs(wanted - golden["logits_1"]).max() > 1e-2  # it is another cache
    greedy: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 5}
    assert model.generate(prompt, **greedy).tokens == plain.generate(prompt, **greedy).tokens


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_16_bit_logits_with_an_fp8_cache(dtype: str) -> None:
    """Prompts on converted pages, and steps; beside float32 with such a cache. Keys that 16 bits round otherwise may be
    stored as another number: so a part of what the cache itself costs is allowed."""
    case = next(c for c in CASES if c.name == "llama3-gqa")
    model, golden, meta = _load(case, dtype, "fp8")
    plain = cuplama.load(case, device="numpy", context=meta["context"], kv_cache_dtype="fp8")
    prompt = golden["prompt_1"].tolist()
    wanted = plain.logits(prompt)
    cost, own = kl(golden["logits_1"], wanted).mean(), meta["kl"][{"bf16": "bfloat16", "f16": "float16"}[dtype]]
    for logits in (model.logits(prompt), stepwise(model, prompt)):
        assert kl(wanted, logits).mean() <= 2 * own + cost / 2


RECORDED = ("gpt2-char", "llama-rope-dynamic", "llama3-gqa", "mistral-window", "phi3-longrope", "qwen2-window", "qwen3")


@pytest.mark.parametrize("name", RECORDED)
def test_replayed_prompts(name: str) -> None:
    """Ragged batches, of a part of each prompt and of the rest: the first is not captured, the second is run as it is,
    the third captured, and then they are replayed."""
    case = next(c for c in CASES if c.name == name)
    model, golden, meta = _load(case, "f32")
    plain = cuplama.load(case, device="numpy", context=meta["context"], cache_tokens=2 * meta["context"])
    prompts = [golden[f"prompt_{j}"].tolist() for j in (2, 0, 1)]
    for i in range(5):
        batch = [p[i:] or p for p in prompts]
        for a, b in zip(continued(model, batch), continued(plain, batch), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3, rtol=0)
    passes = model.engine.runner.passes
    assert len(passes) == 2
    kept: list[Any] = [passes.take(size) for size in passes.sizes]
    assert all(p.graph._graph for p in kept)


@pytest.mark.parametrize("name", ["llama3-gqa", "gpt2-char", "phi3-longrope", "qwen2-window"])
def test_sequences_that_join_and_leave_captured_steps(name: str) -> None:
    """At any token, with all that a sampler can do, across the border of a page, and where pages are short."""
    case = next(c for c in CASES if c.name == name)
    model, golden, meta = _load(case, "f32")
    plain = cuplama.load(case, device="numpy", context=meta["context"], prefix_cache=False)
    vocab, first = model.config.vocab_size, golden["prompt_1"].tolist()
    long = [(3 * i + 1) % vocab for i in range(min(61, meta["context"] - 12))]
    plan: list[tuple[int, list[int], dict[str, Any]]] = [
        (0, long, {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True}),
        (2, first, {"temperature": 1.0, "seed": 2, "max_tokens": 4}),
        (4, first[:3], {"temperature": 1.0, "seed": 3, "max_tokens": 5, "frequency_penalty": 0.5, "logprobs": 2}),
        (5, long[:64], {"temperature": 0.0, "logit_bias": {3: 2.0}, "min_tokens": 2, "max_tokens": 3}),
    ]
    for found, (_, tokens, params) in zip(follow(model, plan), plan, strict=True):
        assert_same(found, plain.generate(tokens, **params))
    model.engine.pipeline.abandon()
    assert_all_pages_free(model)


@pytest.mark.slow
def test_captured_steps_whose_sequences_lose_their_pages() -> None:
    """Three of up to 80 tokens in a cache of three pages: those that come later lose theirs with steps in flight."""
    model, golden, _ = _load(next(c for c in CASES if c.name == "gpt2-char"), "f32")
    plain = cuplama.load(model.folder, device="numpy", context=80, prefix_cache=False)
    scheduler = model.engine.scheduler
    held = list[int]()
    scheduler.cache.extend(held, 64)  # of four pages
    greedy: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    prompts = [[*range(46), *golden[f"prompt_{j}"].tolist()[:12]] for j in (1, 2, 0)]
    wanted = [plain.generate(p, **greedy).tokens for p in prompts]
    found = follow(model, [(i, p, greedy) for i, p in enumerate(prompts)])
    assert [c.tokens for c in found] == wanted
    assert scheduler.preemptions > 0
