"""Runs that share a cache too small for all of them: who waits, who is suspended, and that every text stays the same.

NumPy plays the device; with captured steps as one that is late: what a replay writes is seen when something waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cuplama import Model
from cuplama.engine import sharing as module
from cuplama.engine.kv_cache import PAGE, pages_for
from cuplama.engine.sequence import SequenceState
from cuplama.engine.sharing import Run
from cuplama.errors import ClosedError
from cuplama.sampling_params import SamplingParams
from tests.fakes import LateNumPyBackend
from tests.tiny import CHARS, LLAMA, load

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": None}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.3, "max_tokens": None}
PROMPTS = ["First", "The", "To be"]
_SECONDS = 60.0  # after which a test that waits has failed


@pytest.fixture(params=["plain", "late"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The characters' model with a cache of two pages, its whole context."""
    if request.param == "late":
        monkeypatch.setattr("cuplama.backends.numpy.NumPyBackend", LateNumPyBackend)
    with load(CHARS) as model:
        _spoil_free_pages(model, monkeypatch)
        yield model
        assert model.engine.cache.free == model.engine.cache.pages == 2
        assert not model.engine.sharing._runs


def _spoil_free_pages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page holds when it comes back is NaN from then on: nobody may count on it."""
    cache = model.engine.cache
    shrink = cache.shrink

    def spoil(owned: list[int], tokens: int) -> None:
        for array in cache.arrays.values():
            array[owned[pages_for(tokens) :]] = np.nan
        shrink(owned, tokens)

    monkeypatch.setattr(cache, "shrink", spoil)


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def wanted(request: pytest.FixtureRequest, chars: Model) -> tuple[dict[str, Any], list[str]]:
    """Parameters, and the text of each prompt alone: to the end of the context."""
    return request.param, [chars.generate(p, **request.param).text for p in PROMPTS]


def _in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that run at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result(_SECONDS) for done in [pool.submit(call) for call in calls]]


# ---- one thread ------------------------------------------------------------------------------------------------------


def test_a_call_inside_the_loop_over_a_stream(model: Model, wanted: Any) -> None:
    params, texts = wanted
    inner, outer = [], ""
    for i, delta in enumerate(model.stream(PROMPTS[0], **params)):
        outer += delta.text
        if i in (0, 1, 40):
            inner.append(model.generate(PROMPTS[1], **params).text)
            assert model.logits([1] * 80).shape == (80, 65)
    assert (outer, inner) == (texts[0], [texts[1]] * 3)


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
    """Together they need four pages of two: each takes them from the other when it needs them."""
    params, texts = wanted
    streams = [model.stream(p, **params) for p in PROMPTS]
    found = ["", "", ""]
    for _ in range(77):
        for i, stream in enumerate(streams):
            found[i] += "".join(d.text for d in [next(stream, None)] if d is not None)
    assert found == texts


def test_streams_that_fit_together_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch, greedy: str) -> None:
    with load(CHARS, cache_tokens=4 * PAGE) as model:
        monkeypatch.setattr(module.Sharing, "_suspend", lambda *_: pytest.fail("suspended"))
        pairs = zip(model.stream("First", **GREEDY), model.stream("First", **GREEDY), strict=True)
        assert "".join(a.text + b.text for a, b in pairs) == "".join(2 * c for c in greedy)


def test_a_suspended_stream_can_be_closed(model: Model, wanted: Any) -> None:
    params, texts = wanted
    outer = model.stream(PROMPTS[0], **params)
    next(outer)
    inner = model.stream([PROMPTS[1], PROMPTS[1]], **params)
    next(inner)
    assert model.generate(PROMPTS[2], **params).text == texts[2]
    outer.close()
    assert "".join(d.text for d in inner if d.index == 1) == texts[1]


def test_a_batch_that_does_not_fit_beside_an_open_stream(model: Model, wanted: Any) -> None:
    params, texts = wanted
    with model.stream(PROMPTS[0], **params) as stream:
        first = next(stream).text
        assert [c.text for c in model.generate(PROMPTS, **params)] == texts
        assert first + "".join(d.text for d in stream) == texts[0]


def test_an_error_in_a_step_lets_others_go_on(model: Model, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, texts = wanted
    with model.stream(PROMPTS[0], **params) as stream:
        first = next(stream).text
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.runner, "forward", lambda batch: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.generate(PROMPTS[1], **params)
            with pytest.raises(ZeroDivisionError):
                model.logits([1] * 70)
        assert first + "".join(d.text for d in stream) == texts[0]


def test_logits_of_a_run_that_is_suspended_between_two_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 65, 80).tolist()
    whole = model.logits(tokens)
    monkeypatch.setattr(model.backend, "prefill_chunk", 16)
    rows = []
    for part in model.engine.logits(tokens):
        rows.append(part.copy())
        model.generate("First", **GREEDY)
    assert [len(r) for r in rows] == [16] * 5
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=1e-4, rtol=0)


def test_a_call_inside_the_report_of_progress(model: Model, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is read again from its beginning each time; what was reported once is not reported again."""
    params, texts = wanted
    monkeypatch.setattr(model.backend, "prefill_chunk", 2)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert model.generate(PROMPTS[1], **params).text == texts[1]

    assert model.generate(PROMPTS[0], progress=progress, **params).text == texts[0]
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_model_that_is_closed_in_the_report_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(CHARS)
    monkeypatch.setattr(model.backend, "prefill_chunk", 2)
    with pytest.raises(ClosedError, match=r"^the model is closed$"):
        model.generate("First", progress=lambda done, total: model.close())


# ---- several threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_that_fill_the_cache(model: Model, wanted: Any, threads: int) -> None:
    params, texts = wanted
    calls = [lambda i=i: model.generate(PROMPTS[i % 3], **params).text for i in range(threads)]
    assert _in_threads(*calls) == [texts[i % 3] for i in range(threads)]


def test_threads_that_nest(model: Model, wanted: Any) -> None:
    params, texts = wanted

    def nested() -> tuple[str, str]:
        with model.stream(PROMPTS[0], **params) as stream:
            text = next(stream).text
            inner = model.generate(PROMPTS[1], **params).text
            return text + "".join(d.text for d in stream), inner

    assert _in_threads(nested, nested, nested) == [(texts[0], texts[1])] * 3


def test_runs_that_move_do_not_take_pages_from_each_other_in_turn(model: Model, wanted: Any) -> None:
    """The later one waits: a run loses its pages no more often than there are runs before it, and when it begins."""
    params, texts = wanted
    lost: list[Run] = []
    suspend = model.engine.sharing._suspend

    def suspended(run: Run) -> None:
        lost.extend([run] if run.held else [])
        suspend(run)

    model.engine.sharing._suspend = suspended  # type: ignore[method-assign]
    calls = [lambda i=i: model.generate(PROMPTS[i % 3], **params).text for i in range(4)]
    assert _in_threads(*calls) == [texts[i % 3] for i in range(4)]
    assert all(lost.count(run) <= 4 for run in lost)
    assert len(lost) <= 1 + 2 + 3 + 4


def test_a_stream_that_was_forgotten_gives_way(model: Model, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, texts = wanted
    monkeypatch.setattr(module, "IDLE", 0.05)
    forgotten = model.stream(PROMPTS[0], **params)
    first = "".join(next(forgotten).text for _ in range(70))  # both pages
    assert _in_threads(lambda: model.generate(PROMPTS[1], **params).text) == [texts[1]]
    assert first + "".join(d.text for d in forgotten) == texts[0]


def test_closing_the_model_ends_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 30.0)
    model = load(CHARS)
    stream = model.stream("First", **GREEDY)
    for _ in range(70):
        next(stream)
    waits = threading.Event()
    wait = model.engine.sharing._wait
    model.engine.sharing._wait = lambda run: waits.set() or wait(run)  # type: ignore[method-assign,func-returns-value]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(model.engine.generate([_sequence(5)]).__next__)
        assert waits.wait(_SECONDS)
        model.close()
        with pytest.raises(ClosedError, match=r"^the model is closed$"):
            other.result(_SECONDS)


def test_a_stream_is_closed_without_waiting_for_another_threads_step(model: Model, wanted: Any) -> None:
    """Who makes the step gives its pages back: the garbage collector may be the one who closes, in any thread."""
    params, texts = wanted
    stream = model.stream(PROMPTS[0], **params)
    next(stream)
    held, leave = threading.Event(), threading.Event()

    def hold() -> Any:
        with model.engine.sharing.turn:
            held.set()
            assert leave.wait(_SECONDS)
        return model.generate(PROMPTS[1], **params).text

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(hold)
        assert held.wait(_SECONDS)
        stream.close()
        assert model.engine.cache.free < model.engine.cache.pages
        leave.set()
        assert other.result(_SECONDS) == texts[1]


def test_who_waits_is_woken_when_another_run_is_suspended(empty: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 2 * _SECONDS)
    sharing, other, waits = empty.engine.sharing, _run(empty, 2, 5), threading.Event()

    def wait() -> None:
        with sharing.turn:
            waits.set()
            sharing._wait(Run())

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(wait)
        assert waits.wait(_SECONDS)
        with sharing.turn:
            sharing._suspend(other)
        done.result(_SECONDS)


# ---- who gives way ---------------------------------------------------------------------------------------------------


def _sequence(tokens: int) -> SequenceState:
    return SequenceState([1] * tokens, SamplingParams(seed=0, max_tokens=1000), frozenset())


def _run(model: Model, pages: int, tokens: int, **state: Any) -> Run:
    """A run in the queue that holds so many pages for a sequence of so many tokens."""
    run = Run([_sequence(tokens)], pages, **{"thread": 1, **state})
    model.engine.sharing._runs.append(run)
    run.place = next(model.engine.sharing._places)
    model.engine.sharing.take(run, [(run.sequences[0], pages * PAGE)])
    run.sequences[0].cached = tokens
    return run


def _at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The clock stands."""
    monkeypatch.setattr("cuplama.engine.sharing.time.monotonic", lambda: seconds)


@pytest.fixture
def empty() -> Iterator[Model]:
    """A model with a cache of eight pages."""
    with load(LLAMA, context=128, cache_tokens=8 * PAGE) as model:
        yield model


def test_what_no_token_is_in_is_taken_first_from_anybody(empty: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _at(monkeypatch, 0.5)
    ended: list[int] = []
    older = _run(empty, 6, 2 * PAGE)
    older.end_loop = lambda: ended.append(1)
    younger = Run([_sequence(5)], 8, thread=2)
    empty.engine.sharing.take(younger, [(younger.sequences[0], 3 * PAGE)])
    assert (older.held, older.suspensions, younger.held, ended) == (2, 0, 3, [1])
    assert older.end_loop is None
    assert empty.engine.sharing.room(older) == 8
    assert empty.engine.sharing.room(younger) == 6


def test_an_idle_run_is_suspended_and_goes_to_the_end_of_the_queue(
    empty: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at(monkeypatch, 10.0)
    idle, moving = _run(empty, 4, 4 * PAGE, moved=8.0), _run(empty, 4, 4 * PAGE, moved=9.5)
    asked = Run([_sequence(5)], 8, thread=2, place=99)
    assert empty.engine.sharing._make_room(asked, 4)
    assert (idle.held, idle.suspensions, idle.sequences[0].cached) == (0, 1, 0)
    assert idle.place > moving.place
    assert (moving.held, moving.suspensions) == (4, 0)
    assert not empty.engine.sharing._make_room(asked, 5)  # and then nobody loses anything
    assert moving.held == 4
    idle.moved = 0
    idle.asked = True  # its thread waits for its turn: it is not idle
    empty.engine.sharing.take(idle, [(idle.sequences[0], 4 * PAGE)])
    assert not empty.engine.sharing._make_room(asked, 4)


def test_of_runs_that_move_only_a_later_one_is_suspended(empty: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _at(monkeypatch, 0.5)
    first, second, third = (_run(empty, n, n * PAGE, thread=n) for n in (2, 3, 3))
    third.thread = 9
    assert empty.engine.sharing._make_room(second, 2)
    assert [r.held for r in (first, second, third)] == [2, 3, 0]
    assert not empty.engine.sharing._make_room(third, 4)
    assert empty.engine.sharing._make_room(first, 6)
    assert [r.held for r in (first, second, third)] == [2, 0, 0]


def test_to_its_own_thread_a_run_is_idle_at_once(empty: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _at(monkeypatch, 0.0)
    outer = _run(empty, 8, 8 * PAGE, thread=5, asked=True)
    assert not empty.engine.sharing._make_room(Run(thread=6, place=99), 1)
    assert empty.engine.sharing._make_room(Run(thread=5, place=99), 1)
    assert outer.suspensions == 1


def test_after_a_fork_only_the_forking_thread_keeps_its_pages(empty: Model) -> None:
    sharing = empty.engine.sharing
    own, other = (_run(empty, 3, 3 * PAGE, thread=t) for t in (threading.get_ident(), 1))
    turn, other.end_loop = sharing.turn, lambda: pytest.fail("its loop may be in use")
    sharing.start_again()
    assert (own.held, own.suspensions, own.sequences[0].cached) == (3, 0, 3 * PAGE)
    assert (other.held, other.suspensions, other.sequences[0].cached) == (0, 1, 0)
    assert (empty.engine.cache.free, sharing.turn is turn) == (5, False)


def test_pages_ahead_are_all_for_a_run_alone_and_a_few_for_others(empty: Model) -> None:
    take_ahead, cache = empty.engine.sharing.take_ahead, empty.engine.cache
    one = Run([_sequence(PAGE)])
    take_ahead(one, [(one.sequences[0], 7 * PAGE)])
    assert (one.held, cache.free) == (7, 1)
    cache.shrink(one.sequences[0].pages, PAGE)
    with empty.engine.sharing.entered(one):
        two = Run([_sequence(PAGE), _sequence(5)])
        take_ahead(two, [(s, 100 * PAGE) for s in two.sequences])
        assert [len(s.pages) for s in two.sequences] == [3, 3]
        empty.engine.sharing.release(two.sequences)
        alone = Run([_sequence(PAGE)])
        take_ahead(alone, [(alone.sequences[0], 100 * PAGE)])
        assert alone.held == pages_for(PAGE + module._MARGIN)
    empty.engine.cache.free_all_but([])
    short, long = _sequence(5), _sequence(5)
    take_ahead(Run([short, long]), [(short, PAGE), (long, 7 * PAGE)])
    assert [len(s.pages) for s in (short, long)] == [1, 7]


@pytest.fixture(scope="module")
def greedy(chars: Model) -> str:
    """The greedy continuation of "First" up to the full context."""
    text: str = chars.generate("First", **GREEDY).text
    return text
