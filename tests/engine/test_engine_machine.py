"""A whole engine in any order of calls and accidents: every text is the one that its sequence has alone.

NumPy plays the device, one that is late: what a replay writes is seen when something waits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cuplama import Model
from cuplama.engine.kv_cache import PAGE
from tests.engine.test_joining import KINDS
from tests.engine.test_pages import spoil_new_pages
from tests.fakes import LateNumPyBackend
from tests.tiny import DELTA, LLAMA, assert_all_pages_free, load

BEGINNINGS = [[], [1 + i % 9 for i in range(PAGE)], [1 + i % 9 for i in range(PAGE + 7)], [5] * (2 * PAGE - 1)]
RESTS = [[3], [4, 5, 6], [7] * 12]
MOST = (1, 12, 75)


@cache
def _plain(folder: Path) -> Model:
    return load(folder, context=256, prefix_cache=False)


@cache
def alone(folder: Path, beginning: int, rest: int, kind: int, most: int) -> tuple[list[int], str | None]:
    """Tokens and finish_reason of a sequence that nothing happens to."""
    done = _plain(folder).generate(*_call(beginning, rest), **_options(kind, most))
    return done.tokens, done.finish_reason


def _call(beginning: int, rest: int) -> tuple[list[int]]:
    return ([*BEGINNINGS[beginning], *RESTS[rest]],)


def _options(kind: int, most: int) -> dict[str, Any]:
    options = {"seed": kind, "max_tokens": MOST[most], **KINDS[kind]}
    return options | {"min_tokens": min(options.get("min_tokens", 0), MOST[most])}


class Machine(RuleBasedStateMachine):
    """Streams of one model, read by one thread."""

    folder = LLAMA

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self.streams: list[tuple[Any, list[int], tuple[int, int, int, int]]] = []

    @initialize(
        pages=st.sampled_from([4, 5, 9]), running=st.integers(1, 6), chunk=st.sampled_from([16, 512]),
        late=st.booleans(), prefix=st.booleans(), spare=st.sampled_from([0, 1, 8]),
    )  # fmt: skip
    def begin(self, pages: int, running: int, chunk: int, late: bool, prefix: bool, spare: int) -> None:
        for module in ("engine", "memory"):
            self._patch.setattr(f"cuplama.engine.{module}.SPARE_SLOTS", spare)
        if late:
            self._patch.setattr("cuplama.backends.numpy.NumPyBackend", LateNumPyBackend)
        self.model = load(self.folder, context=256, cache_tokens=pages * PAGE, max_running=running, prefix_cache=prefix)
        self._patch.setattr(self.model.backend, "prefill_chunk", chunk)
        spoil_new_pages(self.model.engine.cache, self._patch)

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                while self.streams:
                    self._read(0, 1000)
                assert_all_pages_free(self.model)
                scheduler = self.model.engine.scheduler
                assert (scheduler.waiting, scheduler.running, self.model.engine._calls) == ([], [], {})
                self.model.close()
        finally:
            self._patch.undo()

    @rule(
        beginning=st.integers(0, 3), rest=st.integers(0, 2), kind=st.integers(0, len(KINDS) - 1), most=st.integers(0, 2)
    )
    def open(self, beginning: int, rest: int, kind: int, most: int) -> None:
        stream = self.model.stream(*_call(beginning, rest), **_options(kind, most))
        self.streams.append((stream, [], (beginning, rest, kind, most)))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), count=st.sampled_from([1, 2, 5, 30]))
    def read(self, data: st.DataObject, count: int) -> None:
        self._read(data.draw(st.integers(0, len(self.streams) - 1)), count)

    def _read(self, i: int, count: int) -> None:
        stream, tokens, key = self.streams[i]
        wanted, reason = alone(self.folder, *key)
        for _ in range(count):
            delta = next(stream, None)
            if delta is None:
                assert (tokens, stream.completion.finish_reason) == (wanted, reason)
                del self.streams[i]
                return
            tokens.append(delta.token.id)
        assert tokens == wanted[: len(tokens)]

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.streams.pop(data.draw(st.integers(0, len(self.streams) - 1)))[0].close()

    @precondition(lambda self: self.model.engine.scheduler.running)
    @rule(data=st.data())
    def take_pages(self, data: st.DataObject) -> None:
        scheduler = self.model.engine.scheduler
        scheduler.preempt(data.draw(st.sampled_from(scheduler.running)))
        self.model.engine.pipeline._vacate()

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), after=st.integers(0, 6), fault=st.sampled_from([KeyboardInterrupt, ZeroDivisionError]))
    def fail(self, data: st.DataObject, after: int, fault: type[BaseException]) -> None:
        """Something goes wrong on the device while one reads. Ctrl-C ends that one; an error ends all that ran."""
        i = data.draw(st.integers(0, len(self.streams) - 1))  # first: drawing may end the example
        never = 1 << 60
        run, left = self.model.backend.run, [after]

        def failing(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                left[0] = never
                raise fault
            return run(*args)

        self.model.backend.run = failing  # type: ignore[method-assign, assignment]
        try:
            self._read(i, 40)
        except fault:
            del self.streams[i]
        self.model.backend.run = run  # type: ignore[method-assign]
        left[0] = never  # a pass that was captured meanwhile goes on calling it
        calls = {id(s): call for call in self.model.engine._calls.values() for s in call.sequences}
        for entry in self.streams[:]:
            (state,) = _states(entry[0])
            call = calls.get(id(state))
            if call is not None and call.error is not None:
                with pytest.raises(fault):
                    entry[1].extend(delta.token.id for delta in entry[0])
                assert entry[1] == alone(self.folder, *entry[2])[0][: len(entry[1])]
                self.streams.remove(entry)

    @invariant()
    def pages_are_whole(self) -> None:
        if not hasattr(self, "model"):
            return
        cache, scheduler = self.model.engine.cache, self.model.engine.scheduler
        owners = [0] * cache.pages
        for s in scheduler.running:
            for page in s.pages:
                owners[page] += 1
        assert cache._owners == owners
        assert not any(s.pages for s in scheduler.waiting)
        assert len(scheduler.running) <= scheduler.max_running
        loop = self.model.engine.pipeline._loop
        states = cache.states
        if states.arrays:
            slots = [s.slot for s in scheduler.running]
            assert sorted([*slots, *states._empty, *states._kept.values()]) == list(range(1, states.slots + 1))
        assert not any(s.slot for s in scheduler.waiting)
        rows = {} if loop is None else {row: s for row, s in enumerate(loop.rows) if s is not None}
        assert rows == {s.row: s for s in scheduler.running if s.row is not None}


class DeltaMachine(Machine):
    """The same of a model whose layers have states."""

    folder = DELTA


def _states(stream: Any) -> list[Any]:
    """The sequences of a stream."""
    return [output.sequence for output in stream._completions.__self__.outputs]


_FAST = settings(max_examples=14, stateful_step_count=20, deadline=None, derandomize=True)


@pytest.mark.parametrize("machine", [Machine, DeltaMachine])
def test_an_engine_in_any_order(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=_FAST)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Machine, DeltaMachine])
def test_an_engine_in_any_order_for_long(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=settings(_FAST, max_examples=120, stateful_step_count=40))
