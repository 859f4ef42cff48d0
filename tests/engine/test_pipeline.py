"""What is queued when, on a runner that only writes down what it is asked: passes, decode loops, rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.decode import AHEAD
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.pipeline import Pipeline
from cuplama.engine.sampler import Needs
from cuplama.engine.scheduler import Scheduler
from cuplama.engine.sequence import SequenceState, Token
from cuplama.errors import DeviceError
from cuplama.models.config import Layer, load_config
from cuplama.models.rope import Rope
from cuplama.sampling_params import SamplingParams
from tests.paths import GOLDEN

LONGROPE = Rope("longrope", 1e4, 4, 128, 32, {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]})
DEFAULT = Rope("default", 1e4, 4, 128, 128, {})
Parts = list[tuple[SequenceState, int]]


class _Loop:
    """A decode loop that draws a token for every row, and counts. events: what happened to rows, in order."""

    def __init__(self, runner: _Runner, sequences: int, needs: Needs) -> None:
        self.runner, self.sequences, self.needs = runner, sequences, needs
        self.rows: list[SequenceState | None] = [None] * sequences
        self.in_flight = self.launched = self.most = self.closed = 0
        self.pages: dict[int, int] = {}  # of each row, as the device knows them

    def launch(self) -> None:
        self.in_flight += 1
        self.launched += 1
        self.most = max(self.most, self.in_flight)
        self.runner.events.append(f"step {''.join(str(s.prompt[0]) if s else '-' for s in self.rows)}")
        for row, s in enumerate(self.rows):
            if s is not None:  # the place of the token after its own, too, unless it is the last
                assert self.pages[row] == len(s.pages) >= -(-min(len(s.tokens) + s.ahead + 1, s.until) // PAGE)

    def read(self) -> list[np.ndarray[Any, Any]]:
        self.in_flight -= 1
        outs: list[Any] = [np.full(self.sequences, self.runner.token, np.int32)]
        if self.needs.top_n is not None:
            outs += [np.zeros(self.sequences), np.zeros((self.sequences, 1)), np.zeros((self.sequences, 1))]
        return outs

    def leave(self, row: int) -> None:
        assert self.rows[row] is not None
        self.rows[row] = None

    def set_pages(self, row: int, pages: list[int], first: int) -> None:
        assert self.pages[row] == first
        self.pages[row] = len(pages)

    def close(self) -> None:
        self.closed += 1


class _Runner:
    """events: passes as "5:3 6:1" (first token of a sequence, and how many are fed), steps as "step 5-6"."""

    def __init__(self, pages: int, chunk: int, rope: Rope, token: int) -> None:
        self.config = replace(load_config(GOLDEN / "llama3-gqa"), layers=(Layer(0, rope),))
        self.backend: Any = NumPyBackend()
        self.backend.prefill_chunk = chunk
        self.cache = PagedCache(self.backend, self.config, pages)
        self.token, self.events, self.loops, self.kept = token, list[str](), list[_Loop](), list[_Loop]()
        self.dropped = 0

    def batch(self, parts: Parts, all_logits: bool) -> Parts:
        self.events.append(" ".join(f"{s.prompt[0]}:{count}" for s, count in parts))
        return parts

    def forward(self, parts: Parts) -> np.ndarray[Any, Any] | None:
        through = [[float(s.prompt[0])] for s, count in parts if s.cached + count == len(s.tokens)]
        return np.array(through) if through else None

    def draw(self, active: list[SequenceState], logits: np.ndarray[Any, Any]) -> Any:
        assert logits[:, 0].tolist() == [s.prompt[0] for s in active]
        return SimpleNamespace(wait=lambda: [np.full(len(active), self.token, np.int32)])

    def loop(self, sequences: int, needs: Needs) -> _Loop:
        self.loops.append(_Loop(self, sequences, needs))
        return self.loops[-1]

    def begin(self, loop: _Loop, active: list[SequenceState]) -> None:
        assert not loop.in_flight
        loop.rows = [*active, *[None] * (loop.sequences - len(active))]
        loop.pages = {row: len(s.pages) for row, s in enumerate(active)}

    def join(self, loop: _Loop, row: int, s: SequenceState) -> None:
        assert loop.rows[row] is None
        loop.rows[row], loop.pages[row] = s, len(s.pages)

    def keep(self, loop: _Loop) -> None:
        self.kept.append(loop)

    def drop_graphs(self) -> None:
        self.dropped += 1


def _pipeline(
    captures: bool = True, pages: int = 8, chunk: int = 512, rope: Rope = DEFAULT, token: int = 1, context: int = 128,
    most: int = 99,
) -> tuple[Pipeline, Any]:  # fmt: skip
    runner: Any = _Runner(pages, chunk, rope, token)
    runner.backend.captures = captures
    return Pipeline(runner, Scheduler(runner.cache, context, most, [rope], prefix_cache=False)), runner


def _add(pipeline: Pipeline, name: int, tokens: int, max_tokens: int | None = None, **options: Any) -> SequenceState:
    stops = frozenset(options.pop("stops", ()))
    s = SequenceState([name] * tokens, SamplingParams(max_tokens=max_tokens, seed=0, **options), stops)
    scheduler = pipeline.scheduler
    s.order = 0, len(scheduler.waiting) + len(scheduler.running)
    scheduler.measure(s)
    if s.finish_reason is None:
        scheduler.add(s)
    return s


def _step(pipeline: Pipeline) -> list[int]:
    """Who gets a token, by name."""
    pipeline.queue()
    return [s.prompt[0] for s, _ in pipeline.read().drawn]


def _run(pipeline: Pipeline) -> list[list[int]]:
    found = []
    while pipeline.scheduler.running or pipeline.scheduler.waiting:
        found.append(_step(pipeline))
        assert len(found) < 1000
    assert pipeline.scheduler.cache.free == pipeline.scheduler.cache.pages
    return [names for names in found if names]


@pytest.mark.parametrize("captures", [False, True])
def test_a_stop_token_ends_its_sequence_alone(captures: bool) -> None:
    pipeline, _ = _pipeline(captures)
    stops, goes_on = _add(pipeline, 5, 3, 9, stops={1, 4}), _add(pipeline, 6, 3, 4, stops={4})
    assert _run(pipeline) == [[5, 6], [6], [6], [6]]
    assert (stops.finish_reason, stops.tokens) == ("stop", [5, 5, 5, 1])
    assert (goes_on.finish_reason, goes_on.generated) == ("length", 4)
    assert (pipeline.generated, pipeline.prompt_tokens) == (5, 6)


@pytest.mark.parametrize("captures", [False, True])
def test_a_caller_may_end_a_sequence(captures: bool) -> None:
    """While later tokens of it are in flight: they are shown to nobody."""
    pipeline, _ = _pipeline(captures)
    one, _ = _add(pipeline, 5, 3, 9), _add(pipeline, 6, 3, 4)
    who = [_step(pipeline), _step(pipeline)]
    one.finish_reason = "stop"
    who += _run(pipeline)
    assert who == [[5, 6], [5, 6], [6], [6]]
    assert one.generated == 2


def test_a_prompt_that_leaves_no_room_gets_no_token() -> None:
    pipeline, runner = _pipeline(context=8)
    full, none, last = _add(pipeline, 5, 8), _add(pipeline, 6, 3, 0), _add(pipeline, 7, 7)
    assert _run(pipeline) == [[7]]
    assert [s.finish_reason for s in (full, none, last)] == ["length"] * 3
    assert len(last.tokens) == 8
    assert runner.events == ["7:7"]


def test_those_that_wait_run_when_others_have_ended() -> None:
    pipeline, runner = _pipeline(captures=False, most=2)
    for name in (1, 2, 3):
        _add(pipeline, name, 3, name)
    assert _run(pipeline) == [[1, 2], [2, 3], [3], [3]]
    assert runner.events == ["1:3 2:3", "2:1 3:3", "3:1", "3:1"]


@pytest.mark.parametrize("captures", [False, True])
def test_logits_that_are_not_finite_end_one_sequence_with_the_place_and_the_dtype(captures: bool) -> None:
    pipeline, runner = _pipeline(captures)
    s = _add(pipeline, 5, 7, 9)
    first = _step(pipeline) if captures else []
    runner.token = -1
    other = _add(pipeline, 6, 3, 1)
    _run(pipeline)
    assert isinstance(s.error, DeviceError)
    length = 7 + len(first)
    assert str(s.error).startswith(f"the logits after {length} tokens are not finite in f32; --dtype float32 ")
    assert (s.finish_reason, s.generated, other.finish_reason) == ("error", len(first), "error")


def test_captured_steps_are_queued_ahead_but_never_too_many() -> None:
    pipeline, runner = _pipeline()
    s = _add(pipeline, 5, 3, 9)
    assert len(_run(pipeline)) == 9
    (loop,) = runner.loops
    assert (loop.launched, loop.most, loop.in_flight) == (8, AHEAD, 0)
    assert s.cached == len(s.tokens) - 1


def test_a_sequence_joins_behind_the_steps_that_are_queued() -> None:
    """Into a row that is free: the loop goes on, and nobody waits."""
    pipeline, runner = _pipeline(pages=20)
    for name in range(1, 10):
        _add(pipeline, name, 3, 30)
    for _ in range(3):
        _step(pipeline)
    late, (loop,) = _add(pipeline, 0, 5, 9), runner.loops
    while late.row is None:
        before = loop.in_flight
        _step(pipeline)
    assert before >= AHEAD - 1
    assert len(_run(pipeline)) >= 20
    assert (runner.loops[0], loop.rows[9]) == (loop, None)
    assert "step 1234567890--" in runner.events
    assert late.generated == 9


def test_a_row_that_was_left_is_taken_by_the_next() -> None:
    pipeline, runner = _pipeline()
    for name in (1, 2, 3):
        _add(pipeline, name, 3, 40 if name != 2 else 4)
    while len(pipeline.scheduler.running) == 3 or not pipeline.scheduler.running:
        _step(pipeline)
    late = _add(pipeline, 4, 3, 40)
    while late.row is None:
        _step(pipeline)
    _step(pipeline)
    assert [loop.sequences for loop in runner.loops] == [3]
    assert runner.events[-1] == "step 143"


def test_a_loop_is_left_for_one_that_fits_when_it_has_not_fitted_for_some_steps() -> None:
    pipeline, runner = _pipeline(most=8)
    for name in range(1, 6):
        _add(pipeline, name, 3, 60 if name == 1 else 5)
    _run(pipeline)
    assert [loop.sequences for loop in runner.loops] == [5, 1]
    assert runner.kept == runner.loops[:1]
    assert runner.loops[0].launched + runner.loops[1].launched == 59
    assert 4 + 8 <= runner.loops[0].launched <= 4 + 8 + 2 * AHEAD


def test_one_that_needs_more_than_the_loop_can_do_changes_it() -> None:
    pipeline, runner = _pipeline()
    plain = _add(pipeline, 1, 3, 20)
    _step(pipeline)
    _step(pipeline)
    _add(pipeline, 2, 3, 9, logprobs=0, frequency_penalty=0.5)
    _run(pipeline)
    needs = [loop.needs for loop in runner.loops]
    assert needs[:2] == [Needs(), Needs(penalised=True, top_n=0)]
    assert [loop.sequences for loop in runner.loops[:2]] == [1, 2]
    assert plain.generated == 20


@pytest.mark.parametrize("tokens", [PAGE - 1, PAGE, PAGE + 1])
def test_the_page_of_a_token_is_there_before_it_is_fed(tokens: int) -> None:
    """``_Loop.launch`` looks."""
    pipeline, runner = _pipeline(context=300)
    for name in (1, 2):
        _add(pipeline, name, tokens, 140)
    _step(pipeline)
    _add(pipeline, 3, tokens, 140)
    assert len(_run(pipeline)) >= 140
    assert runner.loops


def test_a_rotation_that_changes_in_mid_run_is_a_pass_over_the_whole_sequence() -> None:
    pipeline, runner = _pipeline(rope=LONGROPE)
    _add(pipeline, 5, 30, 8)
    assert len(_run(pipeline)) == 8
    assert [e for e in runner.events if "step" not in e] == ["5:30", "5:33"]
    assert sum(loop.launched for loop in runner.loops) == 6


def test_who_loses_its_pages_loses_its_row_even_if_the_pass_has_no_part_left() -> None:
    """Pages are taken from one that decodes, and then from the reader itself, for whom they are too few."""
    pipeline, runner = _pipeline(pages=4, context=4 * PAGE)
    scheduler, held = pipeline.scheduler, list[int]()
    decodes = _add(pipeline, 1, 3, 30)
    while decodes.row is None:
        _step(pipeline)
    reader = SequenceState([2] * (2 * PAGE + 1), SamplingParams(max_tokens=1, seed=0), frozenset())
    reader.order = -1, 1
    scheduler.measure(reader)
    scheduler.add(reader)
    scheduler.admit()
    scheduler.cache.extend(held, 2 * PAGE)
    pipeline.queue()
    assert decodes.row is None
    assert decodes.pages == reader.pages == []
    assert not any(any(loop.rows) for loop in runner.loops)
    scheduler.cache.release(held)
    _run(pipeline)
    assert (decodes.generated, reader.generated) == (30, 1)


def test_after_a_failure_all_begin_again_and_what_was_read_is_not_lost() -> None:
    pipeline, runner = _pipeline()
    one, two = _add(pipeline, 5, 3, 9), _add(pipeline, 6, 3, 2)
    assert _step(pipeline) == [5, 6]
    pipeline.queue()
    pipeline._read_steps()  # as before a change of loops, which then fails
    assert two.finish_reason == "length"
    pipeline.abandon()
    assert (one.row, one.pages, one.cached, runner.loops[0].closed, runner.dropped) == (None, [], 0, 1, 1)
    news = pipeline.read()
    assert [s.prompt[0] for s, _ in news.drawn][:2] == [5, 6]
    assert news.ended == [two]
    drawn = len(news.drawn) + sum(map(len, _run(pipeline)))
    assert drawn == 9 + 2 - 2
    assert one.tokens == [5] * 3 + [1] * 9


def test_the_end_of_one_that_was_dropped_leaves_the_rows_of_others() -> None:
    pipeline, _ = _pipeline(most=1)
    one, two = _add(pipeline, 5, 3, 30), _add(pipeline, 6, 3, 30)
    for _ in range(3):
        _step(pipeline)
    assert one.row == 0
    pipeline.abandon([one])
    for _ in range(3):
        _step(pipeline)
    assert two.row == 0
    pipeline.drop(one)
    assert sum(map(len, _run(pipeline))) + 3 >= 28
    assert two.generated == 30


def test_many_prompts_are_read_between_steps_and_no_step_waits_for_ever() -> None:
    pipeline, runner = _pipeline(pages=99, chunk=16)
    _add(pipeline, 1, 3, 60)
    for _ in range(3):
        _step(pipeline)
    for name in (2, 3, 4, 5):
        _add(pipeline, name, 100, 2)
    _run(pipeline)
    kinds = "".join("s" if e.startswith("step") else "p" for e in runner.events)
    assert "ppppppp" not in kinds
    assert kinds.count("p") >= 26


@pytest.mark.parametrize(("waiting", "most"), [(1, 40), (3, 40), (6, 64), (11, 100), (50, 100)])
def test_a_pass_is_long_only_where_many_tokens_wait(waiting: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 40 tokens; a pass of more than 40 is long here, and 100 are the most."""
    monkeypatch.setattr("cuplama.engine.pipeline.LONG_PASS", 40)
    pipeline, runner = _pipeline(pages=99, chunk=100)
    for name in range(waiting):
        _add(pipeline, 1 + name, 40, 1)
    pipeline.queue()
    fed = [sum(int(part.split(":")[1]) for part in event.split()) for event in runner.events]
    assert max(fed) == most


def test_a_loop_has_rows_for_those_whose_prompts_are_still_read() -> None:
    """Prompts of 10 tokens in passes of 16: the second arrives in two pieces, the third behind it, and so on."""
    pipeline, runner = _pipeline(pages=99, chunk=16, most=64)
    for name in range(1, 41):
        _add(pipeline, name, 10, 60)
    _run(pipeline)
    sizes = [loop.sequences for loop in runner.loops]
    assert sizes[:2] == [16, 48]  # of one sequence, with room for 15; of all
    assert all(size < 16 for size in sizes[2:])


def test_steps_wait_while_many_more_wait_than_decode() -> None:
    pipeline, runner = _pipeline(pages=99, chunk=16)
    _add(pipeline, 1, 3, 60)
    for _ in range(3):
        _step(pipeline)
    runner.events.clear()
    for name in range(2, 9):
        _add(pipeline, name, 10, 2)
    _run(pipeline)
    kinds = "".join("s" if e.startswith("step") else "p" for e in runner.events)
    assert kinds.startswith("ppps")
    assert "ppppp" not in kinds


def test_tokens_without_scores_are_one_object_each() -> None:
    pipeline, _ = _pipeline()
    _add(pipeline, 5, 3, 3)
    news = []
    while pipeline.scheduler.running or pipeline.scheduler.waiting:
        pipeline.queue()
        news += pipeline.read().drawn
    assert {id(token) for _, token in news} == {id(news[0][1])}
    assert news[0][1] == Token(1)
