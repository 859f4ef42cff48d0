"""Captured steps whose sequences join, leave and get pages at any token: each text is the one that it is alone.

NumPy plays the device, one that is late: what a replay writes is seen when something waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cuplama import Model
from cuplama.engine.kv_cache import PAGE
from tests.engine.test_pages import spoil_new_pages
from tests.tiny import LLAMA, assert_all_pages_free, load

# What a sequence may ask for, in the order in which one joins the other: none, each need of a sampler, and all.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.8, "logit_bias": {3: 2.0, 5: -4.0}},
    {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": list(range(40)), "top_p": 0.9},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 0, "presence_penalty": 0.7, "min_tokens": 3, "stop_token_ids": [4, 9]},
]


def prompt(i: int, tokens: int = 9) -> list[int]:
    return [1 + (7 * i + j * j) % 90 for j in range(tokens)]


@pytest.fixture
def model(late_device: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    with load(LLAMA, context=256, cache_tokens=40 * PAGE) as model:
        spoil_new_pages(model.engine.cache, monkeypatch)
        yield model
        assert_all_pages_free(model)


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    """The same model without captured steps or shared beginnings, where every sequence is alone."""
    with load(LLAMA, context=256, prefix_cache=False) as model:
        yield model


def assert_same(found: Any, wanted: Any) -> None:
    assert (found.tokens, found.finish_reason) == (wanted.tokens, wanted.finish_reason)
    assert (found.logprobs is None) == (wanted.logprobs is None)
    for a, b in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [t for t, _ in a.top] == [t for t, _ in b.top]
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)


def follow(model: Model, plan: list[tuple[int, list[int], dict[str, Any]]]) -> list[Any]:
    """The completions of streams that begin at these steps of the first, (step, prompt, parameters)."""
    streams: list[Any] = []
    step, waiting, done = 0, sorted(enumerate(plan), key=lambda p: p[1][0]), {}
    while waiting or streams:
        while waiting and (waiting[0][1][0] <= step or not streams):
            i, (_, tokens, params) = waiting.pop(0)
            streams.append((i, model.stream(tokens, **params)))
        for i, stream in streams[:]:
            if next(stream, None) is None:
                done[i] = stream.completion
                streams.remove((i, stream))
        step += 1
    return [done[i] for i in range(len(plan))]


@pytest.mark.parametrize("order", [1, -1], ids=["more", "fewer"])
@pytest.mark.parametrize("gap", [0, 1, 2, 5])
def test_sequences_of_all_kinds_join_and_leave(model: Model, plain: Model, gap: int, order: int) -> None:
    """Those that come need more than the loop can do, or less."""
    plan = [
        (gap * i, prompt(i), {"seed": i, "max_tokens": 12 + 5 * (i % 4), **kind})
        for i, kind in enumerate(KINDS[::order] * 2)
    ]
    for found, (_, tokens, params) in zip(follow(model, plan), plan, strict=True):
        assert_same(found, plain.generate(tokens, **params))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_comings_and_goings(model: Model, plain: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan = [
        (
            int(rng.integers(0, 60)),
            prompt(i, int(rng.integers(1, 140))),
            {"seed": i, "max_tokens": int(rng.integers(9, 40)), **KINDS[rng.integers(len(KINDS))]},
        )
        for i in range(20)
    ]
    for found, (_, tokens, params) in zip(follow(model, plan), plan, strict=True):
        assert_same(found, plain.generate(tokens, **params))


@pytest.mark.parametrize("tokens", [1, PAGE - 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_prompts_that_end_at_the_border_of_a_page(model: Model, plain: Model, tokens: int) -> None:
    """Alone, and beside one whose own border comes at another step."""
    params: dict[str, Any] = {"temperature": 0, "max_tokens": PAGE + 6, "ignore_eos": True}
    wanted = [plain.generate(prompt(i, tokens + 3 * i), **params).tokens for i in range(3)]
    assert model.generate(prompt(0, tokens), **params).tokens == wanted[0]
    found = follow(model, [(2 * i, prompt(i, tokens + 3 * i), params) for i in range(3)])
    assert [c.tokens for c in found] == wanted


def test_the_loop_grows_and_shrinks(model: Model, plain: Model) -> None:
    plan: list[tuple[int, list[int], dict[str, Any]]]
    plan = [(i // 3, prompt(i), {"temperature": 0, "max_tokens": 60 if i < 2 else 24 + i % 5}) for i in range(30)]
    for found, (_, tokens, params) in zip(follow(model, plan), plan, strict=True):
        assert_same(found, plain.generate(tokens, **params))
    sizes = {key[0] for key in model.engine.runner.steps.sizes if isinstance(key, tuple)}
    assert len(sizes) > 2
    assert max(sizes) >= 12


def test_a_row_of_nobody_writes_nothing(model: Model, plain: Model) -> None:
    """It stays where it is: on the padding page, and without a length."""
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    streams = [model.stream(prompt(i), **params) for i in range(3)]
    for stream in streams * 3:
        next(stream)
    streams[1].close()
    for stream in streams[::2] * 6:
        next(stream)
    loop = model.engine.pipeline._loop
    assert loop is not None
    empty = [row for row, s in enumerate(loop.rows) if s is None]
    assert empty
    device, padding = loop._inputs.device, model.engine.cache.padding_page
    for row in empty:
        assert (device["seq_lens"][row], device["slot_mapping"][row]) == (0, padding * PAGE)
        assert (device["page_table"][row] == padding).all()
    for i in (0, 2):
        assert [*(d.token.id for d in streams[i])][-1] == plain.generate(prompt(i), **params).tokens[-1]
