"""Which sequences have pages, and which tokens each pass gets. Nothing is computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.scheduler import Scheduler
from cuplama.engine.sequence import SequenceState
from cuplama.models.rope import Rope
from cuplama.sampling_params import SamplingParams

LONGROPE = Rope("longrope", 1e4, 4, 128, 32, {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]})
DEFAULT = Rope("default", 1e4, 4, 128, 128, {})


def _scheduler(pages: int = 8, context: int = 128, most: int = 99, rope: Rope = DEFAULT, prefix: bool = False) -> Any:
    backend: Any = SimpleNamespace(dtype=np.dtype(np.float32))
    config: Any = SimpleNamespace(caches={}, delta_layers=())
    return Scheduler(PagedCache(backend, config, pages), context, most, [rope], prefix)


def _add(scheduler: Scheduler, tokens: int, max_tokens: int | None = None, priority: int = 0, **options: Any) -> Any:
    """A sequence that waits. Its name is its first token, and the number of its tokens."""
    order = priority, len(scheduler.waiting) + len(scheduler.running)
    s = SequenceState([tokens] * tokens, SamplingParams(max_tokens=max_tokens, seed=0, **options), frozenset())
    s.order = order
    scheduler.measure(s)
    scheduler.add(s)
    return s


def _names(sequences: list[SequenceState]) -> list[int]:
    return [s.prompt[0] for s in sequences]


def _parts(scheduler: Scheduler, rows: int = 512, logits: int = 512, decodes: bool = False) -> list[tuple[int, int]]:
    """What the next pass takes, by name; it is queued."""
    parts = scheduler.next_parts(rows, logits, decodes)
    for s in scheduler.queued(parts):
        s.ahead = 1
    return [(s.prompt[0], count) for s, count in parts]


def _drawn(s: SequenceState, count: int = 1) -> None:
    """Tokens have been drawn for it and read; all but the last are fed."""
    s.tokens += [1] * count
    s.cached, s.ahead = len(s.tokens) - 1, 0


# ---- who has pages ---------------------------------------------------------------------------------------------------


def test_sequences_are_admitted_in_order_while_there_is_room_for_their_tokens() -> None:
    scheduler = _scheduler(pages=4)
    for tokens in (PAGE, PAGE + 1, 3, 2 * PAGE, 5):
        _add(scheduler, tokens)
    scheduler.admit()
    assert _names(scheduler.running) == [PAGE, PAGE + 1, 3]  # 1 + 2 + 1 pages
    assert _names(scheduler.waiting) == [2 * PAGE, 5]  # the last one has to wait for its turn
    assert scheduler.cache.free == 4  # they have none yet, but they were promised
    scheduler.admit()
    assert len(scheduler.running) == 3
    assert _parts(scheduler) == [(PAGE, PAGE), (PAGE + 1, PAGE + 1), (3, 3)]
    assert scheduler.preemptions == 0


def test_pages_for_tokens_to_come_are_not_kept_free() -> None:
    scheduler = _scheduler(pages=2, context=128)
    for tokens in (PAGE, PAGE - 1):
        _add(scheduler, tokens, 60)
    scheduler.admit()
    assert _names(scheduler.running) == [PAGE, PAGE - 1]


def test_of_many_pages_one_in_a_hundred_stays_free_for_those_that_grow() -> None:
    scheduler = _scheduler(pages=200)
    for _ in range(3):
        _add(scheduler, 66 * PAGE)
    scheduler.admit()
    assert len(scheduler.running) == 3  # 198 of 200
    scheduler = _scheduler(pages=200)
    for _ in range(2):
        _add(scheduler, 99 * PAGE + 1)
    scheduler.admit()
    assert len(scheduler.running) == 1


def test_one_that_fits_alone_is_admitted_alone() -> None:
    scheduler = _scheduler(pages=2)
    _add(scheduler, 2 * PAGE)
    scheduler.admit()
    assert _parts(scheduler) == [(2 * PAGE, 2 * PAGE)]


def test_no_more_run_than_may() -> None:
    scheduler = _scheduler(most=2)
    one, *_ = [_add(scheduler, n) for n in (3, 4, 5, 6)]
    scheduler.admit()
    assert _names(scheduler.running) == [3, 4]
    scheduler.remove(one)
    scheduler.admit()
    assert (_names(scheduler.running), _names(scheduler.waiting)) == ([4, 5], [6])


def test_lower_priorities_go_first_and_equal_ones_in_order() -> None:
    scheduler = _scheduler(most=3)
    for tokens, priority in ((3, 0), (4, 5), (5, -1), (6, 0)):
        _add(scheduler, tokens, priority=priority)
    assert _names(scheduler.waiting) == [5, 3, 6, 4]
    scheduler.admit()
    assert (_names(scheduler.running), _names(scheduler.waiting)) == ([5, 3, 6], [4])
    _add(scheduler, 7, priority=-9)
    assert _names(scheduler.waiting) == [7, 4]


def test_the_last_loses_its_pages_for_those_before_it() -> None:
    scheduler = _scheduler(pages=3)
    one, two, three = (_add(scheduler, n) for n in (PAGE, PAGE - 1, PAGE - 2))
    scheduler.admit()
    _parts(scheduler)
    _drawn(one)
    assert scheduler.make_room(one, len(one.tokens))
    assert (_names(scheduler.running), _names(scheduler.waiting)) == ([PAGE, PAGE - 1], [PAGE - 2])
    assert (three.pages, three.cached, three.ahead, three.row, three.life) == ([], 0, 0, None, 1)
    assert (one.life, two.life, scheduler.preemptions) == (0, 0, 1)
    _drawn(two, 2)
    assert not scheduler.make_room(two, len(two.tokens))  # it is the last itself
    assert _names(scheduler.waiting) == [PAGE - 1, PAGE - 2]  # in its old place
    assert scheduler.make_room(one, 3 * PAGE)
    assert one.life == 0


def test_who_goes_on_again_reads_all_its_tokens() -> None:
    scheduler = _scheduler(pages=2)
    s = _add(scheduler, 10)
    scheduler.admit()
    _parts(scheduler)
    _drawn(s, 7)
    scheduler.preempt(s)
    scheduler.admit()
    assert _parts(scheduler) == [(10, 17)]


def test_how_long_a_sequence_becomes() -> None:
    scheduler = _scheduler(context=20)
    limits = [_add(scheduler, 6, n).limit for n in (None, 0, 3, 14, 15)]
    assert limits == [20, 6, 9, 20, 20]
    full, none, read = (SequenceState([1] * n, p, frozenset(), every_logit=e) for n, p, e in (
        (20, SamplingParams(seed=0), False), (3, SamplingParams(seed=0, max_tokens=0), False),
        (20, SamplingParams(seed=0), True)))  # fmt: skip
    scored = SequenceState([1] * 20, SamplingParams(seed=0, prompt_logprobs=1), frozenset())
    for s in (full, none, read, scored):
        scheduler.measure(s)
    assert [s.finish_reason for s in (full, none, read, scored)] == ["length", "length", None, None]


def test_nothing_counts_after_a_failure_and_the_dropped_have_neither_pages_nor_rows() -> None:
    scheduler = _scheduler(most=2, prefix=True)
    one, two, three = (_add(scheduler, n * PAGE) for n in (1, 2, 1))
    scheduler.admit()
    _parts(scheduler)
    one.row, two.row = 0, 1
    scheduler.start_again([two])
    assert (_names(scheduler.waiting), scheduler.running, scheduler.cache.free) == ([PAGE, PAGE], [], 8)
    for s in (one, two):
        assert (s.pages, s.cached, s.ahead, s.row, s.life) == ([], 0, 0, None, 1)
    assert three.life == 0
    scheduler.admit()
    assert [s.found for s in scheduler.running] == [0, 0]  # what was in the pages is not there any more


# ---- what goes into a pass -------------------------------------------------------------------------------------------


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
    scheduler = _scheduler(rope=rope)
    s, other = _add(scheduler, cached), _add(scheduler, 20)
    scheduler.admit()
    _parts(scheduler)
    s.tokens += [1] * (tokens - cached)
    s.cached, s.ahead, other.ahead = cached, 0, 0
    other.tokens.append(1)
    assert _parts(scheduler) == [(cached, fed), (20, 1)]
    assert (s.cached, other.cached) == (tokens, 21)


@pytest.mark.parametrize("rows", [7, 16, 31, 33])
def test_a_long_prompt_is_read_once_whatever_the_size_of_a_pass(rows: int) -> None:
    """Its chunks below the original context are rotated as those beyond it."""
    scheduler = _scheduler(rope=LONGROPE)
    s = _add(scheduler, 100)
    scheduler.admit()
    counts = []
    while s.cached < 100:
        counts += [count for _, count in _parts(scheduler, rows)]
        assert len(counts) <= 100 // rows + 1
    assert sum(counts) == 100


def test_what_is_computed_again_is_written_to_other_pages() -> None:
    """The old ones may be shared, or found by what they hold."""
    scheduler = _scheduler(rope=Rope("longrope", 1e4, 4, 512, 2 * PAGE, LONGROPE.settings), context=512, prefix=True)
    one, two = _add(scheduler, 2 * PAGE), _add(scheduler, 2 * PAGE)
    for _ in range(2):
        scheduler.admit()
        _parts(scheduler)
    assert one.pages[0] == two.pages[0]
    shared = one.pages[:]
    _drawn(one)
    assert _parts(scheduler) == [(2 * PAGE, 2 * PAGE + 1)]
    assert not set(one.pages) & set(shared)
    assert two.pages[0] == shared[0]
    three = _add(scheduler, 2 * PAGE)
    scheduler.admit()
    assert three.pages == shared[:1]


def test_a_step_of_many_sequences_is_one_pass_and_prompts_are_not() -> None:
    scheduler = _scheduler()
    for n in range(1, 6):
        _add(scheduler, n)
    scheduler.admit()
    _parts(scheduler)
    for s in scheduler.running:
        _drawn(s)
    assert _parts(scheduler, rows=2) == [(n, 1) for n in range(1, 6)]
    scheduler = _scheduler()
    for n in (7, 2):
        _add(scheduler, n)
    scheduler.admit()
    assert [_parts(scheduler, rows=4) for _ in range(4)] == [[(7, 4)], [(7, 3), (2, 1)], [(2, 1)], []]


def test_where_all_logits_are_asked_for_a_prompt_has_passes_of_its_own() -> None:
    scheduler = _scheduler()
    scored, plain, last = _add(scheduler, 5, prompt_logprobs=0), _add(scheduler, 4), _add(scheduler, 3)
    last.every_logit = True
    scheduler.admit()
    assert _parts(scheduler, 9, 4) == [(5, 4)]
    assert _parts(scheduler, 9, 4) == [(5, 1)]
    assert _parts(scheduler, 9, 4) == [(4, 4)]
    assert _parts(scheduler, 9, 2) == [(3, 2)]
    scored.told = 4
    _drawn(scored)
    _drawn(plain)
    assert _parts(scheduler, 9, 2) == [(5, 1), (4, 1)]  # and its text is as any other


def test_what_captured_steps_feed_is_in_no_pass() -> None:
    scheduler = _scheduler(rope=LONGROPE)
    drawn, reads, ends, turns, ahead = (_add(scheduler, n, 9) for n in (3, 4, 5, 32, 6))
    scheduler.admit()
    for _ in range(2):
        _parts(scheduler)
    for s in (drawn, ends, turns, ahead):
        _drawn(s)
    reads.cached, reads.ahead, ends.limit, ahead.ahead = 2, 0, 6, 1
    assert [scheduler.may_decode(s) for s in (drawn, reads, ends, turns, ahead)] == [True, False, False, False, False]
    assert scheduler.next_parts(99, 9, True)[0][1] == 2
    assert {s.prompt[0] for s, _ in scheduler.next_parts(99, 9, True)} == {4, 5, 32}
    assert {s.prompt[0] for s, _ in scheduler.next_parts(99, 9, False)} == {3, 4, 5, 32}


def test_captured_steps_end_where_a_sequence_does_or_its_rotation_changes() -> None:
    scheduler = _scheduler(rope=LONGROPE)

    def left(tokens: int, max_tokens: int | None, ahead: int = 0) -> int:
        s = _add(scheduler, tokens, max_tokens)
        _drawn(s)
        s.ahead = ahead
        return int(scheduler.steps_left(s))

    assert left(3, 9) == 8
    assert left(3, 9, ahead=2) == 6
    assert left(19, None) == 32 - 20 + 1
    assert left(39, None) == 128 - 40
