"""Threads that share an engine: each gets its own text, whoever makes the steps, and whatever happens to the others."""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cuplama import Model, SamplingParams
from cuplama.engine import engine as module
from cuplama.engine.calls import Call
from cuplama.engine.kv_cache import PAGE
from cuplama.engine.sequence import SequenceState
from cuplama.errors import BusyError, ClosedError
from tests.tiny import CHARS, assert_all_pages_free, in_threads, load

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": None}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": None}
LONG: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 24}


@pytest.fixture
def model(either_device: str) -> Iterator[Model]:
    """The characters' model with a cache of five pages, where its context takes two."""
    with load(CHARS, cache_tokens=5 * PAGE) as model:
        yield model
        model.engine._settle()
        assert_all_pages_free(model)
        scheduler = model.engine.scheduler
        assert (scheduler.running, scheduler.waiting, model.engine._calls) == ([], [], {})


def _alone(chars: Model, prompts: list[str], params: dict[str, Any]) -> list[str]:
    return [chars.generate(p, **params).text for p in prompts]


@pytest.mark.parametrize("params", [{**GREEDY, "max_tokens": 20}, LONG], ids=["greedy", "sampled"])
def test_twenty_threads_get_their_own_texts(model: Model, chars: Model, params: dict[str, Any]) -> None:
    prompts = [f"{'ab' * i}{chr(65 + i)}" for i in range(20)]
    calls = [lambda p=p: model.generate(p, **params).text for p in prompts]
    assert in_threads(*calls) == _alone(chars, prompts, params)
    assert model.engine.stats.steps < sum(map(len, _alone(chars, prompts, params)))  # they share steps


def test_streams_that_are_closed_forgotten_or_half_read_hold_nobody_up(model: Model, chars: Model) -> None:
    prompts = [chr(65 + i) * (i + 1) for i in range(12)]
    (wanted, half), begun = _alone(chars, ["First", "Half"], GREEDY), threading.Barrier(len(prompts) + 1)

    def leave_early(i: int) -> None:
        stream = model.stream(prompts[i], **SAMPLED)
        for _ in range(i % 5):
            next(stream)
        begun.wait(60)
        if i % 3 == 0:
            stream.close()
        elif i % 3 == 1:
            loop: list[Any] = [stream]
            loop.append(loop)  # found by the collector alone, in whatever thread it runs
            del stream, loop
        else:
            del stream

    reader = model.stream("Half", **GREEDY)
    text = "".join(next(reader).text for _ in range(9))

    def reads() -> Any:
        begun.wait(60)
        return model.generate("First", **GREEDY).text

    results = in_threads(reads, *(lambda i=i: leave_early(i) for i in range(len(prompts))))
    gc.collect()
    assert results == [wanted, *[None] * len(prompts)]
    assert text + "".join(d.text for d in reader) == half


def test_forgotten_streams_are_collected_at_any_line(model: Model, chars: Model) -> None:
    """The collector may run in the middle of a wait or a hand-over; it must wait for nothing then."""
    prompts = ["First", "The", "To be"]
    wanted = _alone(chars, prompts, LONG)

    def forget() -> None:
        stream: list[Any] = [model.stream("Gone", **LONG)]
        next(stream[0])
        stream.append(stream)

    def run(i: int) -> list[str]:
        found = []
        for _ in range(3):
            forget()
            found.append(model.generate(prompts[i], **LONG).text)
        return found

    before = gc.get_threshold()
    gc.set_threshold(3, 2, 2)
    try:
        results = in_threads(*(lambda i=i: run(i) for i in range(3)))
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert results == [[text] * 3 for text in wanted]


def test_a_wait_takes_no_lock_that_its_wake_takes() -> None:
    """The collector may end a stream, and so wake a call, while this very thread is about to wait for that call."""
    call = Call([SequenceState([1], SamplingParams(seed=0), frozenset())])
    assert isinstance(call._ready, type(threading.Lock()))
    call.wake()
    call.wake()
    begun = time.monotonic()
    call.wait(60)  # open
    assert time.monotonic() - begun < 30
    call.wait(0.01)  # and closed again


def test_a_stream_is_closed_without_waiting_for_another_threads_step(model: Model, chars: Model) -> None:
    """Who makes the step gives its pages back: the garbage collector may be the one who closes, in any thread."""
    (wanted,) = _alone(chars, ["The"], GREEDY)
    stream = model.stream("First", **GREEDY)
    next(stream)
    held, leave, cache = threading.Event(), threading.Event(), model.engine.cache

    def hold() -> Any:
        with model.engine._turn:
            held.set()
            assert leave.wait(60)
        return model.generate("The", **GREEDY).text

    def close() -> bool:
        assert held.wait(60)
        stream.close()
        used = cache.free < cache.pages
        leave.set()
        return used

    assert in_threads(hold, close) == [wanted, True]


def test_steps_are_handed_to_one_who_waits_for_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to the first call that has nothing new: nobody may be reading that, and all would wait for it."""
    monkeypatch.setattr(module, "_LOOK_AGAIN", 100.0)
    full, idle = Call([SequenceState([1], SamplingParams(seed=0), frozenset())]), list[int]()
    monkeypatch.setattr(full, "wake", lambda: idle.append(1))
    model.engine._calls[0] = full  # the first of all
    texts = in_threads(*(lambda i=i: len(model.generate("abc"[i], **GREEDY).tokens) for i in range(3)), seconds=30)
    assert texts == [79] * 3
    assert not idle
    del model.engine._calls[0]


# ---- what happens in a step ------------------------------------------------------------------------------------------


def _fail_once(model: Model, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 0) -> list[int]:
    """The pass or step after so many fails. Returns where it is counted."""
    seen, run, loops = [0], model.backend.run, threading.Lock()

    def failing(*args: Any) -> Any:
        with loops:
            seen[0] += 1
            fails = seen[0] == after + 1
        if fails:
            raise error
        return run(*args)

    monkeypatch.setattr(model.backend, "run", failing)
    return seen


@pytest.mark.parametrize("after", [0, 1, 2, 7, 40])
def test_ctrl_c_in_a_step_leaves_the_others_with_their_texts(
    model: Model, chars: Model, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    prompts = ["First", "The", "To be", "or not"]
    wanted = _alone(chars, prompts, LONG)
    _fail_once(model, monkeypatch, KeyboardInterrupt(), after)
    results = in_threads(*(lambda p=p: model.generate(p, **LONG).text for p in prompts))
    assert sum(isinstance(r, KeyboardInterrupt) for r in results) == 1
    assert all(r == text or isinstance(r, KeyboardInterrupt) for r, text in zip(results, wanted, strict=True))
    assert _alone(model, prompts, LONG) == wanted


@pytest.mark.parametrize("after", [0, 2, 20])
def test_an_error_in_a_step_reaches_those_that_ran_and_nobody_else(
    model: Model, chars: Model, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    prompts = ["First", "The", "To be", "or not"]
    wanted = _alone(chars, prompts, LONG)
    model.engine.scheduler.max_running = 2
    _fail_once(model, monkeypatch, ZeroDivisionError("a fault"), after)
    results = in_threads(*(lambda p=p: model.generate(p, **LONG).text for p in prompts))
    failed = [isinstance(r, ZeroDivisionError) for r in results]
    assert 1 <= sum(failed) <= 2
    assert all(f or r == text for f, r, text in zip(failed, results, wanted, strict=True))
    assert isinstance(model.engine.failure, ZeroDivisionError) or model.engine.failure is None
    assert _alone(model, prompts, LONG) == wanted
    assert model.engine.failure is None


def test_one_that_ended_in_a_step_that_failed_later_has_its_text(
    late_device: None, chars: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are read before a change of loops. When that fails, they were still drawn."""
    with load(CHARS, cache_tokens=5 * PAGE) as model:
        short, long = model.stream("First", temperature=0, max_tokens=3), model.stream("The", **GREEDY)
        texts = [next(short).text, next(long).text]
        runner = model.engine.runner
        loop = runner.loop

        def failing(*args: Any) -> Any:
            monkeypatch.setattr(runner, "loop", loop)
            raise KeyboardInterrupt

        monkeypatch.setattr(runner, "loop", failing)
        joins = model.stream("To be", temperature=0, max_tokens=5, logprobs=1)  # needs another loop
        results = in_threads(lambda: "".join(d.text for d in joins))
        assert isinstance(results[0], KeyboardInterrupt)
        texts[0] += "".join(d.text for d in short)
        texts[1] += "".join(d.text for d in long)
        assert texts == [chars.generate("First", temperature=0, max_tokens=3).text, *_alone(chars, ["The"], GREEDY)]


def test_no_result_is_lost_that_comes_while_a_call_looks_in_vain(
    model: Model, chars: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, read, late = _alone(chars, ["First"], GREEDY), Call.read, [0]

    def looks(call: Call) -> Any:
        found = read(call)
        if found is None and not call.ended:  # another thread makes all steps now
            late[0] += 1
            while not call.ended:
                model.engine._step()
        return found

    monkeypatch.setattr(Call, "read", looks)
    assert [model.generate("First", **GREEDY).text] == wanted
    assert late[0] > 0


def test_a_stop_string_ends_a_sequence_while_later_tokens_are_in_flight(model: Model, chars: Model) -> None:
    prompts = ["First", "The", "To be"]
    texts = _alone(chars, prompts, SAMPLED)
    stops = [text[20:22] for text in texts]
    wanted = [text[: text.index(stop)] for text, stop in zip(texts, stops, strict=True)]

    def run(i: int) -> tuple[str, str | None]:
        done = model.generate(prompts[i], **SAMPLED, stop=stops[i])
        return done.text, done.finish_reason

    for _ in range(2):
        assert in_threads(*(lambda i=i: run(i) for i in range(3))) == [(text, "stop") for text in wanted]
    together = model.generate(prompts, **SAMPLED, stop=stops)
    first = [min(text.index(stop) for stop in stops if stop in text) for text in texts]
    assert [c.text for c in together] == [text[:at] for text, at in zip(texts, first, strict=True)]


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_no_more_sequences_wait_than_may(either_device: str) -> None:
    with load(CHARS, cache_tokens=8 * PAGE, max_running=1, max_waiting=2) as model:
        streams = [model.stream(p, **GREEDY) for p in "abc"]
        for stream in streams[:1]:
            next(stream)
        waiting = [model.engine.submit([_sequence(i)]) for i in range(2)]
        for refused in (lambda: model.generate("d", **GREEDY), lambda: model.generate(["d", "e"], **GREEDY)):
            with pytest.raises(BusyError, match=r"^3 sequences run or wait already; 1 may run and 2 wait$"):
                refused()
        assert (model.engine.stats.running, model.engine.stats.waiting) == (1, 2)
        for call in waiting:
            model.engine.leave(call)
        assert len(model.generate(["d", "e"], **GREEDY)) == 2  # there is room again
        assert len("".join(d.text for d in streams[0])) == 78
        with pytest.raises(BusyError, match=r"^0 sequences run or wait already"):
            model.generate(list("abcd"), **GREEDY)


def _sequence(token: int) -> SequenceState:
    return SequenceState([token], SamplingParams(seed=0, max_tokens=9), frozenset())


def test_no_more_sequences_run_than_may(either_device: str, chars: Model) -> None:
    prompts, most = [*"abcdefgh"], list[int]()
    with load(CHARS, cache_tokens=20 * PAGE, max_running=3) as model:
        stream, found = model.stream(prompts, **LONG), [""] * 8
        for delta in stream:
            found[delta.index] += delta.text
            most.append(model.engine.stats.running)
    assert found == _alone(chars, prompts, LONG)
    assert max(most) == 3


def test_a_lower_priority_is_admitted_first(either_device: str) -> None:
    with load(CHARS, cache_tokens=20 * PAGE, max_running=1) as model:
        engine, ended = model.engine, list[int]()
        first = engine.submit([_sequence(1)])
        engine._step()
        calls = {p: engine.submit([_sequence(5)], priority=p) for p in (0, 7, -3, 1)}
        while len(ended) < 4:
            engine._step()
            ended += [p for p, call in calls.items() if call.ended and p not in ended]
        assert ended == [-3, 0, 1, 7]
        for call in (first, *calls.values()):
            engine.leave(call)


def test_closing_the_model_ends_those_that_run_and_those_that_wait(either_device: str) -> None:
    model = load(CHARS, cache_tokens=5 * PAGE, max_running=1)
    stream = model.stream("First", **GREEDY)
    next(stream)
    begun = threading.Event()

    def waits() -> None:
        begun.set()
        model.generate("The", **GREEDY)

    def closes() -> None:
        assert begun.wait(60)
        with model.engine._turn:
            time.sleep(0.05)
        model.close()

    results = in_threads(waits, waits, closes)
    assert results[2] is None
    for result in results[:2]:
        assert result is None or isinstance(result, ClosedError)
    with pytest.raises(ClosedError):
        list(stream)


def test_after_a_fork_the_parents_device_is_not_touched(monkeypatch: pytest.MonkeyPatch, late_device: None) -> None:
    """Where a child cannot use it: no graph is closed, and a stream of its own says so."""
    model = load(CHARS)
    stream = model.stream("First", **GREEDY)
    for _ in range(3):
        next(stream)
    monkeypatch.setattr(model.backend, "forks", False, raising=False)
    for target, name in ((model.engine.runner, "drop_graphs"), (model.engine.pipeline, "abandon")):
        monkeypatch.setattr(target, name, lambda *_: pytest.fail("the GPU is the parent's"))
    model.engine.start_again()  # as in the child
    with pytest.raises(Exception, match="cannot be used in a child that was forked"):
        list(stream)
    with pytest.raises(Exception, match="cannot be used in a child that was forked"):
        model.generate("First")


def test_ctrl_c_between_any_two_lines_leaves_the_turn_to_others(chars: Model) -> None:
    """Who makes steps gives the turn back, wherever it is interrupted: else ``close`` waits for it for ever."""
    loop = {"_results", "_waited", "_take_turn", "_give_turn", "_step"}

    def interrupted(at: int) -> bool:
        """Whether a short call has so many lines of the loop that makes its steps."""
        lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name not in loop:
                return None
            # The interpreter looks for signals behind calls and jumps, and so nowhere on the way into or out of a lock.
            if event == "line" and "with self._turn" not in linecache.getline(module.__file__, frame.f_lineno):
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            chars.generate("ab", **{**GREEDY, "max_tokens": 2})
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    at = 1
    while interrupted(at):
        assert not chars.engine._turn.locked(), f"line {at}"
        at += 1
    assert at > 20
