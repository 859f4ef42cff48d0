"""Calls that share a cache too small for all of them: who loses pages, and that every text stays the same.

NumPy plays the device; with captured steps as one that is late: what a replay writes is seen when something waits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cuplama import Model
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.errors import ClosedError
from tests.paths import GOLDEN
from tests.tiny import CHARS, assert_all_pages_free, in_threads, load

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": None}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.3, "max_tokens": None}
PROMPTS = ["First", "The", "To be"]


def spoil_new_pages(cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page or a slot holds when it is given is NaN from now on: nobody may count on it."""
    extend, take, states = cache.extend, cache.states._take, cache.states.arrays
    pages = [array for name, array in cache.arrays.items() if name not in states]

    def spoiled(owned: list[int], tokens: int) -> bool:
        before = len(owned)
        done = extend(owned, tokens)
        for array in pages:
            array[owned[before:]] = np.nan
        return done

    def spoiled_slot() -> int:
        slot = take()
        for array in states.values():
            array[slot] = np.nan
        return slot

    monkeypatch.setattr(cache, "extend", spoiled)
    monkeypatch.setattr(cache.states, "_take", spoiled_slot)


@pytest.fixture
def model(either_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The characters' model with a cache of two pages, its whole context."""
    with load(CHARS) as model:
        spoil_new_pages(model.engine.cache, monkeypatch)
        yield model
        assert model.engine.cache.pages == 2
        assert_all_pages_free(model)
        assert not model.engine.scheduler.waiting


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def wanted(request: pytest.FixtureRequest, chars: Model) -> tuple[dict[str, Any], list[str]]:
    """Parameters, and the text of each prompt alone: to the end of the context."""
    return request.param, [chars.generate(p, **request.param).text for p in PROMPTS]


def test_a_call_inside_the_loop_over_a_stream(model: Model, wanted: Any) -> None:
    params, texts = wanted
    inner, outer = [], ""
    for i, delta in enumerate(model.stream(PROMPTS[0], **params)):
        outer += delta.text
        if i in (0, 1, 40):
            inner.append(model.generate(PROMPTS[1], **params).text)
            assert model.logits([1] * 80).shape == (80, 65)
    assert (outer, inner) == (texts[0], [texts[1]] * 3)
    assert model.engine.stats.preemptions > 0


def test_streams_three_deep(model: Model, wanted: Any) -> None:
    params, texts = wanted
    found = ["", "", ""]
    for i, one in enumerate(model.stream(PROMPTS[0], **params)):
        found[0] += one.text
        for j, two in enumerate(model.stream(PROMPTS[1], **params) if i == 5 else ()):
            found[1] += two.text
            for three in model.stream(PROMPTS[2], **params) if j == 60 else ():
                found[2] += three.text
    assert found == texts


def test_streams_that_go_on_in_turn(model: Model, wanted: Any) -> None:
    """Together they need six pages of two: the first keeps its own, and the others follow."""
    params, texts = wanted
    streams = [model.stream(p, **params) for p in PROMPTS]
    found = ["", "", ""]
    for _ in range(77):
        for i, stream in enumerate(streams):
            found[i] += "".join(d.text for d in [next(stream, None)] if d is not None)
    assert found == texts


def test_sequences_that_fit_together_do_not_disturb_each_other(either_device: str, wanted: Any) -> None:
    params, texts = wanted
    with load(CHARS, cache_tokens=6 * PAGE) as model:
        assert [c.text for c in model.generate(PROMPTS, **params)] == texts
        assert model.engine.stats.preemptions == 0


def test_the_first_never_loses_its_pages(model: Model, wanted: Any) -> None:
    params, texts = wanted
    lost: list[int] = []
    preempt = model.engine.scheduler.preempt
    model.engine.scheduler.preempt = lambda s: lost.append(s.order[1]) or preempt(s)  # type: ignore[method-assign,func-returns-value]
    assert [c.text for c in model.generate(PROMPTS, **params)] == texts
    assert lost
    assert 0 not in lost
    assert len(lost) == model.engine.stats.preemptions <= 4  # and nobody loses them again and again


def test_a_stream_that_has_lost_its_pages_can_be_closed(model: Model, wanted: Any) -> None:
    params, texts = wanted
    outer = model.stream(PROMPTS[0], **params)
    next(outer)
    inner = model.stream([PROMPTS[1], PROMPTS[1]], **params)
    for _ in range(70):
        next(inner)
    assert model.engine.stats.preemptions > 0
    inner.close()
    assert model.generate(PROMPTS[2], **params).text == texts[2]
    outer.close()


def test_logits_of_a_prompt_that_loses_its_pages_between_two_passes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(0, 65, 80).tolist()
    whole = model.logits(tokens)
    monkeypatch.setattr(model.backend, "prefill_chunk", 16)
    rows = []
    scheduler = model.engine.scheduler
    for part in model.engine.logits(tokens):
        rows.append(part.copy())
        if len(rows) in (2, 3) and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
    assert [len(r) for r in rows] == [16] * 5
    assert model.engine.stats.preemptions == 2
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=1e-4, rtol=0)


def test_scores_of_a_prompt_are_told_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read again, and whatever is drawn meanwhile."""
    tokens = np.random.default_rng(1).integers(0, 65, 33).tolist()
    params: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "prompt_logprobs": 2}
    monkeypatch.setattr(model.backend, "prefill_chunk", 16)  # the last pass has one token, which none follows
    alone = model.generate(tokens, **params)
    scheduler, found = model.engine.scheduler, []
    stream = model.stream(tokens, **params)
    for i, delta in enumerate(stream):
        assert delta.token is not None
        found.append(delta.token.id)
        if i in (0, 1, 20) and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
            model.engine.pipeline._vacate()
    assert found == alone.tokens
    assert stream.completion.prompt_logprobs is not None
    assert alone.prompt_logprobs is not None
    assert alone.prompt_logprobs[0] is stream.completion.prompt_logprobs[0] is None
    logits = model.logits(tokens).astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    both: list[Any] = [alone, stream.completion]
    for done in both:
        assert [t.id for t in done.prompt_logprobs[1:] if t] == tokens[1:]
        for i, token in enumerate(done.prompt_logprobs[1:]):
            assert token is not None
            assert token.logprob == pytest.approx(scores[i, tokens[i + 1]], abs=1e-4)
            assert [t for t, _ in token.top] == np.argsort(-scores[i], kind="stable")[:2].tolist()


def test_a_call_inside_the_report_of_progress(model: Model, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the steps of both. What was reported once is not reported again."""
    params, texts = wanted
    monkeypatch.setattr(model.backend, "prefill_chunk", 2)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert model.generate(PROMPTS[1], **params).text == texts[1]

    assert model.generate(PROMPTS[0], progress=progress, **params).text == texts[0]
    assert seen[0] in ((2, 5), (4, 5))  # a second pass may be queued by then
    assert seen == sorted(set(seen))
    assert seen[-1] == (5, 5)


def test_a_model_that_is_closed_in_the_report_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(CHARS)
    monkeypatch.setattr(model.backend, "prefill_chunk", 2)
    with pytest.raises(ClosedError, match=r"^the model is closed$"):
        model.generate("First", progress=lambda done, total: model.close())


def test_threads_that_fill_the_cache(model: Model, wanted: Any) -> None:
    params, texts = wanted
    calls = [lambda i=i: model.generate(PROMPTS[i % 3], **params).text for i in range(5)]
    assert in_threads(*calls) == [texts[i % 3] for i in range(5)]


def test_threads_that_nest(model: Model, wanted: Any) -> None:
    params, texts = wanted

    def nested() -> tuple[str, str]:
        with model.stream(PROMPTS[0], **params) as stream:
            text = next(stream).text
            inner = model.generate(PROMPTS[1], **params).text
            return text + "".join(d.text for d in stream), inner

    assert in_threads(nested, nested, nested) == [(texts[0], texts[1])] * 3


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("name", ["llama-rope-dynamic", "phi3-longrope"])
def test_stretched_rotation_gives_the_same_tokens_after_the_loss_of_pages(
    either_device: str, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """dynamic's frequencies are those of the length that the sequence had when a token came; longrope computes again
    what has grown beyond its original context, and reads a prompt beyond it in chunks."""
    folder = GOLDEN / name
    data = np.load(folder / "golden.npz")
    prompts = [data[f"prompt_{j}"].tolist() for j in range(4)]
    params: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    context = json.loads((folder / "meta.json").read_text())["context"]
    with load(folder, context=context, cache_tokens=max(192, context)) as model:
        monkeypatch.setattr(model.backend, "prefill_chunk", chunk)
        spoil_new_pages(model.engine.cache, monkeypatch)
        alone = [model.generate(p, **params).tokens for p in prompts]
        assert model.engine.stats.preemptions == 0
        assert [c.tokens for c in model.generate(prompts * 2, **params)] == alone * 2
        assert model.engine.stats.preemptions > 0
        assert [c[:24] for c in alone] == [data[f"greedy_{j}"].tolist() for j in range(4)]
