"""Which sequences run together and which tokens each pass gets, on a runner that only writes down what it is asked."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.scheduler import Scheduler
from cuplama.engine.sequence import SequenceState
from cuplama.engine.sharing import Run
from cuplama.errors import DeviceError
from cuplama.models.config import Layer, load_config
from cuplama.models.rope import Rope
from cuplama.sampling_params import SamplingParams
from tests.paths import GOLDEN

LONGROPE = Rope("longrope", 1e4, 4, 128, 32, {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]})
DEFAULT = Rope("default", 1e4, 4, 128, 128, {})
Parts = list[tuple[SequenceState, int]]


class _Loop:
    """A decode loop that draws 1 for everyone, and counts."""

    def __init__(self, sequences: int, ahead: int) -> None:
        self.sequences, self.ahead = sequences, ahead
        self.in_flight = self.launched = self.most = 0

    def launch(self) -> None:
        self.in_flight += 1
        self.launched += 1
        self.most = max(self.most, self.in_flight)

    def read(self) -> list[np.ndarray[Any, Any]]:
        self.in_flight -= 1
        return [np.full(self.sequences, 1, np.int32)]


class _Runner:
    """passes: (index of the sequence's first token, new tokens) of every part; its logits are the sequence's name."""

    def __init__(self, pages: int = 8, chunk: int = 512, rope: Rope = DEFAULT, token: int = 1) -> None:
        self.config = replace(load_config(GOLDEN / "llama3-gqa"), layers=(Layer(0, rope),))
        self.backend: Any = NumPyBackend()
        self.backend.prefill_chunk = chunk
        self.cache = PagedCache(self.backend, self.config, pages)
        self.token, self.passes, self.all_logits = token, list[list[tuple[int, int]]](), list[bool]()
        self.loops, self.ended, self.ahead = list[_Loop](), list[_Loop](), 3

    def batch(self, parts: Parts, all_logits: bool) -> Parts:
        self.passes.append([(s.prompt[0], count) for s, count in parts])
        self.all_logits.append(all_logits)
        return parts

    def forward(self, parts: Parts) -> np.ndarray[Any, Any] | None:
        through = [[float(s.prompt[0])] for s, count in parts if s.cached + count == len(s.tokens)]
        return np.array(through) if through else None

    def draw(self, active: list[SequenceState], logits: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        assert logits[:, 0].tolist() == [s.prompt[0] for s in active]
        return [np.full(len(active), self.token, np.int32)]

    def begin_decode(self, active: list[SequenceState]) -> tuple[str, _Loop]:
        self.loops.append(_Loop(len(active), self.ahead))
        return "key", self.loops[-1]

    def end_decode(self, key: str, loop: _Loop) -> None:
        assert key == "key"
        self.ended.append(loop)


def _scheduler(context: int = 128, captures: bool = False, **options: Any) -> tuple[Scheduler, _Runner]:
    runner: Any = _Runner(**options)
    runner.backend.captures = captures
    return Scheduler(runner, context), runner


def _sequence(name: int, tokens: int, max_tokens: int | None = None, **options: Any) -> SequenceState:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return SequenceState([name] * tokens, params, frozenset(options.pop("stops", ())), **options)


def _run(scheduler: Scheduler, *sequences: SequenceState) -> list[list[int]]:
    """Who gets a token in each step, by name."""
    return [[s.prompt[0] for s, _ in drawn] for drawn in scheduler.run(sequences)]


@pytest.mark.parametrize(
    ("rope", "cached", "tokens", "fed"),
    [
        (LONGROPE, 31, 32, 1),
        (LONGROPE, 32, 33, 33),  # beyond the original context
        (LONGROPE, 1, 40, 40),
        (LONGROPE, 33, 34, 1),
        (DEFAULT, 32, 33, 1),
        (DEFAULT, 1, 40, 39),
    ],
)
def test_a_sequence_is_computed_again_where_its_rotation_changes(
    rope: Rope, cached: int, tokens: int, fed: int
) -> None:
    scheduler, runner = _scheduler(rope=rope)
    s, other = _sequence(5, tokens), _sequence(6, 20)
    s.cached, other.cached = cached, 19
    scheduler.last_logits([s, other])
    assert runner.passes == [[(5, fed), (6, 1)]]
    assert (s.cached, other.cached) == (tokens, 20)


def test_progress_counts_the_tokens_of_all_prompts() -> None:
    scheduler, runner = _scheduler(chunk=4)
    seen = list[tuple[int, int]]()
    one, two = _sequence(5, 6, 3), _sequence(6, 3, 3)
    steps = scheduler.run([one, two], lambda done, total: seen.append((done, total)))
    assert len(list(steps)) == 3
    assert seen == [(4, 9), (8, 9), (9, 9)]  # and not of the tokens that follow
    assert runner.passes == [[(5, 4)], [(5, 2), (6, 2)], [(6, 1)], *[[(5, 1), (6, 1)]] * 2]


def test_a_step_of_many_sequences_is_one_pass_and_prompts_are_not() -> None:
    scheduler, runner = _scheduler(chunk=2)
    steps = [_sequence(i, 9) for i in range(5)]
    for s in steps:
        s.cached = 8
    scheduler.last_logits(steps)
    assert runner.passes == [[(i, 1) for i in range(5)]]
    runner.passes.clear()
    scheduler.last_logits([_sequence(7, 2), _sequence(8, 1)])
    assert runner.passes == [[(7, 2)], [(8, 1)]]
    assert not any(runner.all_logits)


def test_all_logits_are_asked_for_where_they_are_wanted() -> None:
    scheduler, runner = _scheduler(chunk=4)
    assert len(list(scheduler.prefill([_sequence(7, 6)], all_logits=True))) == 1  # the fake gives those of the last
    assert runner.all_logits == [True, True]


def test_logits_that_are_not_finite_are_refused_with_the_place_and_the_dtype() -> None:
    scheduler, runner = _scheduler(token=-1)
    with pytest.raises(DeviceError, match=r"^the logits after 7 tokens are not finite in f32; --dtype float32 "):
        _run(scheduler, _sequence(5, 7))
    assert runner.cache.free == runner.cache.pages


def test_sequences_are_admitted_in_order_while_the_cache_holds_all_at_full_length() -> None:
    scheduler, _ = _scheduler(pages=4)

    def admitted(*tokens: int) -> tuple[list[int], int]:
        found, pages = scheduler._admit(deque(_sequence(n, n, 1) for n in tokens), Run())
        return [s.prompt[0] for s in found], pages

    assert admitted(PAGE, PAGE - 1, PAGE) == ([PAGE, PAGE - 1], 3)
    assert admitted(PAGE, 2, PAGE - 1, 3) == ([PAGE, 2, PAGE - 1], 4)  # full
    assert admitted(100, 2, 100, 3) == ([100, 2], 3)  # the last one would fit, but it is not its turn
    other = Run([_sequence(9, PAGE)])
    with scheduler.sharing.entered(other):
        scheduler.sharing.take(other, [(other.sequences[0], 3 * PAGE)])
        assert admitted(PAGE, 2, 3) == ([PAGE, 2], 3)  # pages for tokens to come are not counted as the other's
        other.sequences[0].tokens *= 3
        assert admitted(2, 3, 4) == ([2], 1)
        assert admitted(PAGE, 3) == ([PAGE], 2)  # one at least


def test_those_that_wait_run_when_others_have_ended() -> None:
    scheduler, runner = _scheduler(pages=2)
    assert _run(scheduler, *(_sequence(i, 3, i) for i in (1, 2, 3))) == [[1, 2], [2], [3], [3], [3]]
    assert runner.cache.free == 2


def test_a_prompt_that_leaves_no_room_gets_no_token() -> None:
    scheduler, runner = _scheduler(context=8)
    full, none, last = _sequence(5, 8), _sequence(6, 3, 0), _sequence(7, 7)
    assert _run(scheduler, full, none, last) == [[7]]
    assert [s.finish_reason for s in (full, none, last)] == ["length"] * 3
    assert len(last.tokens) == 8
    assert runner.passes == [[(7, 7)]]


def test_how_long_a_sequence_becomes() -> None:
    scheduler, _ = _scheduler(context=20)
    assert [scheduler.longest(_sequence(1, 6, n)) for n in (None, 0, 3, 14, 15)] == [20, 6, 9, 20, 20]


@pytest.mark.parametrize("captures", [False, True])
def test_a_stop_token_ends_its_sequence_alone(captures: bool) -> None:
    scheduler, runner = _scheduler(captures=captures)
    stops, goes_on = _sequence(5, 3, 1, stops={1, 4}), _sequence(6, 3, 4, stops={4})
    assert _run(scheduler, stops, goes_on) == [[5, 6], [6], [6], [6]]
    assert (stops.finish_reason, stops.tokens) == ("stop", [5, 5, 5, 1])
    assert (goes_on.finish_reason, goes_on.generated) == ("length", 4)
    assert runner.cache.free == runner.cache.pages


@pytest.mark.parametrize("captures", [False, True])
def test_a_caller_may_end_a_sequence(captures: bool) -> None:
    scheduler, runner = _scheduler(captures=captures)
    one, two = _sequence(5, 3, 9), _sequence(6, 3, 4)
    who = []
    for drawn in scheduler.run([one, two]):
        who.append([s.prompt[0] for s, _ in drawn])
        if len(who) == 2:
            one.finish_reason = "stop"
    assert who == [[5, 6], [5, 6], [6], [6]]
    assert one.generated == 2
    assert runner.cache.free == runner.cache.pages


@pytest.mark.parametrize("ahead", [1, 3])
def test_captured_steps_are_queued_ahead_but_never_too_many(ahead: int) -> None:
    scheduler, runner = _scheduler(captures=True)
    runner.ahead = ahead
    s = _sequence(5, 3, 9)
    assert len(_run(scheduler, s)) == 9
    (loop,) = runner.loops
    assert (loop.launched, loop.most, loop.in_flight) == (8, ahead, 0)
    assert runner.ended == [loop]
    assert s.cached == len(s.tokens) - 1


def test_a_loop_that_is_left_in_mid_flight_is_given_back() -> None:
    scheduler, runner = _scheduler(captures=True)
    steps = scheduler.run([_sequence(5, 3, 9)])
    assert [next(steps) and len(runner.loops) for _ in range(3)] == [0, 1, 1]
    steps.close()
    assert runner.ended == runner.loops
    assert runner.cache.free == runner.cache.pages


def test_captured_steps_end_where_a_sequence_does_or_its_rotation_changes() -> None:
    scheduler, runner = _scheduler(captures=True, rope=LONGROPE)

    def drawn(*sequences: SequenceState) -> list[SequenceState]:
        """As they are when their last token has been drawn, but not fed."""
        for s in sequences:
            s.cached = len(s.tokens) - 1
        return list(sequences)

    assert scheduler._steps_alike(drawn(_sequence(5, 3, 9), _sequence(6, 3, 4))) == 4
    assert scheduler._steps_alike(drawn(_sequence(5, 3), _sequence(6, 20))) == 32 - 20 + 1
    assert scheduler._steps_alike(drawn(_sequence(5, 40))) == 128 - 40
    assert scheduler._steps_alike([*drawn(_sequence(5, 3)), _sequence(5, 3)]) == 0  # the last has lost its keys
    assert scheduler._steps_alike([]) == 0
    runner.backend.captures = False
    assert scheduler._steps_alike(drawn(_sequence(5, 3, 9))) == 0


def test_a_rotation_that_changes_in_mid_run_is_a_pass_over_the_whole_sequence() -> None:
    scheduler, runner = _scheduler(captures=True, rope=LONGROPE)
    assert len(_run(scheduler, _sequence(5, 30, 8))) == 8
    assert runner.passes == [[(5, 30)], [(5, 33)]]
    assert [loop.launched for loop in runner.loops] == [2, 4]
