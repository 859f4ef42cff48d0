"""Scheduler, pages and prefix cache in any order of events, on a pretend device that remembers who wrote what.

The page is made short, so that few tokens fill many.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
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

from cuplama.engine import kv_cache, prefix_cache
from cuplama.engine.kv_cache import PagedCache
from cuplama.engine.scheduler import Scheduler
from cuplama.engine.sequence import SequenceState
from cuplama.models.rope import Rope
from cuplama.sampling_params import SamplingParams

SIZE = 4  # tokens of a page here
PAGES = 10
CONTEXT = 28  # tokens of a sequence: 7 pages
ROPES = {
    "default": Rope("default", 1e4, 4, CONTEXT, CONTEXT, {}),
    "longrope": Rope("longrope", 1e4, 4, CONTEXT, 12, {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}),
    "dynamic": Rope("dynamic", 1e4, 4, 10, 10, {"factor": 2.0}),
}
BEGINNINGS = [[1] * 9, [2] * 4, [1] * 4 + [2] * 5, []]

Written = tuple[Any, tuple[int, ...]]  # a slot: how its keys were rotated, and the tokens up to its own


def _cache() -> PagedCache:
    backend: Any = SimpleNamespace(dtype=np.dtype(np.float32))
    config: Any = SimpleNamespace(caches={}, delta_layers=())
    return PagedCache(backend, config, PAGES)


def rotation(rope: Rope, s: SequenceState, position: int, regime: int) -> Any:
    """What the keys of a token depend on, beside the tokens up to it."""
    if rope.type == "dynamic":
        return max(len(s.prompt), position + 1, rope.context)
    return regime


class Machine(RuleBasedStateMachine):
    """What the pipeline does with a scheduler, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        for module in (kv_cache, prefix_cache):
            self._patch.setattr(module, "PAGE", SIZE)
        self.flying = deque[tuple[bool, list[tuple[SequenceState, int]]]]()
        self.memory: list[list[Written | None]] = [[None] * SIZE for _ in range(PAGES)]
        self.alive, self.arrivals = list[SequenceState](), 0

    def teardown(self) -> None:
        """Nothing is held up for ever, and nothing that fits alone is refused."""
        try:
            if hasattr(self, "scheduler"):
                for _ in range(40 * (len(self.alive) + 1)):
                    self.step()
                    self.read()
                assert not self.alive
                assert not self.scheduler.waiting
                self.consistent()
                assert self.cache.free == PAGES
        finally:
            self._patch.undo()

    @initialize(
        rope=st.sampled_from(sorted(ROPES)), decodes=st.booleans(), prefix=st.booleans(), running=st.integers(1, 5)
    )
    def begin(self, rope: str, decodes: bool, prefix: bool, running: int) -> None:
        self.rope, self.decodes = ROPES[rope], decodes
        self.cache = _cache()
        self.scheduler = Scheduler(self.cache, CONTEXT, running, [self.rope], prefix)

    # -- rules

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        rest=st.lists(st.integers(1, 2), min_size=1, max_size=9),
        most=st.integers(1, 14),
        priority=st.integers(-1, 1),
        scored=st.booleans(),
    )
    def add(self, beginning: list[int], rest: list[int], most: int, priority: int, scored: bool) -> None:
        params = SamplingParams(max_tokens=most, seed=0, prompt_logprobs=0 if scored and len(rest) == 3 else None)
        s = SequenceState([*beginning, *rest], params, frozenset())
        s.order = priority, self.arrivals
        self.arrivals += 1
        self.scheduler.measure(s)
        assert s.finish_reason is None
        self.scheduler.add(s)
        self.alive.append(s)

    @rule(rows=st.sampled_from([1, 3, 6, 50]))
    def step(self, rows: int = 50) -> None:
        """Admit; queue a decode step for those that captured steps feed, and a pass for the others."""
        self.scheduler.admit()
        drawn = [s for s in self.scheduler.running if self.decodes and self.scheduler.may_decode(s)]
        stepped = [s for s in drawn if s.pages and self.scheduler.make_room(s, len(s.tokens))]
        stepped = [s for s in stepped if s.pages]
        for s in stepped:
            self._write(s, len(s.tokens) - 1, 1)
            s.ahead = 1
        if stepped:
            self.flying.append((True, [(s, s.life) for s in stepped]))
        parts = self.scheduler.next_parts(rows, 5, self.decodes)
        assert len({id(s) for s, _ in parts}) == len(parts)
        assert sum(n for s, n in parts if s.cached < len(s.tokens) - 1) <= rows
        assert all(len(s.pages) * SIZE >= s.cached + n for s, n in parts)
        for s, count in parts:
            self._write(s, s.cached, count)
        asked = parts[0][0] if parts and parts[0][0].asks_for_prompt else None
        assert asked is None or len(parts) == 1
        whole = list(self.scheduler.queued(parts))
        for s in whole:
            s.ahead = 1
        if asked is not None:
            asked.told = max(asked.told, min(asked.cached, len(asked.prompt) - 1))
        if parts:
            self.flying.append((False, [(s, s.life) for s in whole]))

    @precondition(lambda self: self.flying)
    @rule()
    def read(self) -> None:
        """Read the oldest pass or step."""
        if not self.flying:
            return
        step, rows = self.flying.popleft()
        for s, life in rows:
            if s.life == life:
                if step:
                    s.cached = len(s.tokens)
                s.ahead -= 1
                s.tokens.append(1 + hash(tuple(s.tokens)) % 2)
                if len(s.tokens) >= s.limit:
                    self._end(s)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.alive)))

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.scheduler.preempt(data.draw(st.sampled_from(self.scheduler.running)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def start_again(self, data: st.DataObject) -> None:
        """After an error: whose sequences are dropped ends; the device's memory holds nothing."""
        dropped = data.draw(st.lists(st.sampled_from(self.alive), max_size=2, unique=True))
        self.flying.clear()
        self.memory = [[None] * SIZE for _ in range(PAGES)]
        self.scheduler.start_again(dropped)
        for s in dropped:
            assert (s.pages, s.row) == ([], None)
            self._end(s)

    def _end(self, s: SequenceState) -> None:
        self.alive.remove(s)
        self.scheduler.remove(s)
        s.life += 1
        assert not s.pages

    def _write(self, s: SequenceState, first: int, count: int) -> None:
        """Tokens are fed. They see the keys of all tokens before them, which have to be their own."""
        regime = self.rope.regime(len(s.tokens))
        for at in range(first, first + count):
            written = rotation(self.rope, s, at, regime), tuple(s.tokens[: at + 1])
            self.memory[s.pages[at // SIZE]][at % SIZE] = written
        self._holds(s, first + count, regime)

    def _holds(self, s: SequenceState, tokens: int, regime: int) -> None:
        for at in range(tokens):
            found = self.memory[s.pages[at // SIZE]][at % SIZE]
            assert found == (rotation(self.rope, s, at, regime), tuple(s.tokens[: at + 1])), (s, at)

    # -- what holds at any time

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        cache, running, waiting = self.cache, self.scheduler.running, self.scheduler.waiting
        owners = [0] * PAGES
        for s in running:
            assert len(set(s.pages)) == len(s.pages)
            for page in s.pages:
                owners[page] += 1
        assert cache._owners == owners
        free = [*cache._empty, *cache._left]
        assert sorted([*free, *(p for p in range(PAGES) if owners[p])]) == list(range(PAGES))
        assert {p: k for k, p in cache._pages.items()} == cache._keys
        assert set(cache._left) <= set(cache._keys)
        assert not set(cache._empty) & set(cache._keys)
        assert len(running) <= self.scheduler.max_running
        for group in (running, waiting):
            assert [s.order for s in group] == sorted(s.order for s in group)
        assert sorted(map(id, (*running, *waiting))) == sorted(map(id, self.alive))
        for s in waiting:
            assert (s.pages, s.cached, s.ahead, s.row) == ([], 0, 0, None)

    @invariant()
    def every_sequence_has_its_own_keys(self) -> None:
        for s in self.scheduler.running if hasattr(self, "scheduler") else ():
            assert s.cached <= len(s.pages) * SIZE
            if s.cached:
                self._holds(s, s.cached, s.regime[0])


_FAST = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
_LONG = settings(_FAST, max_examples=1500, stateful_step_count=80)


def test_scheduler_and_pages_in_any_order() -> None:
    run_state_machine_as_test(Machine, settings=_FAST)


@pytest.mark.slow
def test_scheduler_and_pages_in_any_order_for_long() -> None:
    run_state_machine_as_test(Machine, settings=_LONG)
