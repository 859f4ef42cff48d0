"""What is queued on the device, ahead of the host: passes over prompts and decode steps, in order.

The host queues what it knows without having read the last tokens, and then reads the oldest. Passes and decode steps
take turns while there are both; a sequence whose prompt is through joins the decode loop when its first token has been
read, behind the steps that are queued by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backends import Fetch
from ..dtypes import Array, dtype_name
from ..errors import DeviceError
from .decode import AHEAD, DecodeLoop
from .graphs import LONG_PASS, max_logits, padded_sequences
from .kv_cache import PAGE
from .runner import Runner
from .sampler import Needs, drawn_tokens
from .scheduler import Scheduler
from .sequence import SequenceState, Token

__all__ = ["News", "Pipeline", "not_finite"]

_PASSES = 2  # that may be queued and not read yet: one runs while the host makes the inputs of the other
# At most, where a long backlog waits, or several sequences wait for each that decodes: the more a decode step has, the
# less each costs.
_PASSES_A_STEP = 4
# Tokens of a pass beside decode steps, at least: more make sequences wait longer for their next token (an 8B model on
# an H200 reads 1,024 tokens in 25 ms), fewer read the weights more often. A backlog of more than _BACKLOG times as many
# makes it longer, up to the longest pass.
_LEAST_CHUNK = 1024
_BACKLOG = 2
# A loop has rows for sequences whose prompts are still read: _ROOM times as many as there are, or _LEAST_ROOM.
_ROOM, _LEAST_ROOM = 3, 15
# Decode steps after which a loop is left for one that fits better: leaving it takes as long as a step of a small model.
_PATIENCE = 8


@dataclass
class News:
    """What reading a pass or a step gave: tokens drawn, logits of prompts, tokens of prompts that were read, and
    sequences that ended."""

    drawn: list[tuple[SequenceState, Token]] = field(default_factory=list)
    logits: list[tuple[SequenceState, np.ndarray[Any, Any]]] = field(default_factory=list)
    fed: list[tuple[SequenceState, int]] = field(default_factory=list)
    ended: list[SequenceState] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.drawn or self.logits or self.fed or self.ended)


@dataclass
class _Pass:
    """A pass on its way. fed: (sequence, tokens of its prompt); whole: sequences whose last token it feeds, with their
    lives: they get a token of ``outs``, or end; asked: the logits or scores of a prompt from token ``first`` on."""

    fed: list[tuple[SequenceState, int]]
    whole: list[tuple[SequenceState, int]]
    outs: Fetch | None = None
    asked: Fetch | None = None
    first: int = 0


@dataclass
class _Step:
    """A decode step on its way, and to whom its rows belonged: (row, sequence, its life)."""

    rows: list[tuple[int, SequenceState, int]]


def not_finite(logits: str, dtype: str) -> DeviceError:
    """The error for logits that nothing can be made of."""
    return DeviceError(f"{logits} are not finite in {dtype}; --dtype float32 may help, or a weight is damaged")


class Pipeline:
    """Runs the sequences of a scheduler on a runner. generated, prompt_tokens, steps: what it has done so far."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.generated = self.prompt_tokens = self.steps = 0
        self._flying: deque[_Pass | _Step] = deque()
        self._loop: DecodeLoop | None = None
        self._best: tuple[int, Needs] | None = None  # the loop that fits; None where that is to be worked out again
        self._since = 0  # passes queued since the last step
        self._misfit = 0  # steps for which another loop would have been better
        self._news = News()

    # -- queueing

    def queue(self) -> None:
        """Queue what can be queued now."""
        scheduler = self.scheduler
        for s in [s for s in (*scheduler.running, *scheduler.waiting) if s.finish_reason is not None]:
            self._end(s)  # its caller has ended it
        if scheduler.admit():
            self._best = None
        self._join()
        (backlog, waiting), longest = self._backlog(), self.runner.backend.prefill_chunk
        decoding = self._decodes
        crowd = waiting // max(1, decoding)
        passes_a_step = min(_PASSES_A_STEP, max(1, crowd, 1 + backlog // (_BACKLOG * longest)))
        # A power of two: each size of a pass is captured by itself, which takes 10 to 60 ms.
        share = 1 << max(0, (backlog // _BACKLOG).bit_length() - 1)
        chunk = min(longest, max(_LEAST_CHUNK if decoding else LONG_PASS, share))
        while True:
            flying = sum(isinstance(work, _Pass) for work in self._flying)
            may_read = flying < (_PASSES if self.runner.backend.captures else 1)
            read = may_read and self._queue_pass(chunk)
            self._since += read
            is_due = self._since >= passes_a_step or (may_read and not read)
            if is_due and self._queue_step():
                self._since = 0
            elif not read:
                return

    def read(self) -> News:
        """Wait for the oldest that is queued, unless something was read on the way to here; what that gave."""
        if self._flying and not self._news:
            self._read_oldest()
        news, self._news = self._news, News()
        return news

    def drop(self, s: SequenceState) -> None:
        """A sequence has ended: its row and its pages are free for others, behind what is queued."""
        self._leave(s)
        self.scheduler.remove(s)
        s.life += 1

    def abandon(self, dropped: Iterable[SequenceState] = ()) -> None:
        """Something has failed: nothing that is queued counts, and every sequence but those begins again.

        What was read before is still news: its tokens are in their sequences.
        """
        loop, self._loop = self._loop, None
        self._flying.clear()
        if loop is not None:
            loop.close()
        self.runner.drop_graphs()
        self.scheduler.start_again(dropped)

    def _backlog(self) -> tuple[int, int]:
        """Tokens of prompts that are to be read, and of how many sequences they are."""
        everyone = (*self.scheduler.running, *self.scheduler.waiting)
        unread = [n for s in everyone if s.row is None and (n := len(s.tokens) - s.cached) > 0]
        return sum(unread), len(unread)

    @property
    def _decodes(self) -> int:
        """How many sequences draw by captured steps now."""
        return 0 if self._loop is None else sum(s is not None for s in self._loop.rows)

    def _queue_pass(self, chunk: int) -> bool:
        """Queue a pass over the next tokens of prompts, ``chunk`` at most, if there are any."""
        scheduler, runner = self.scheduler, self.runner
        captures = runner.backend.captures
        limit = max_logits(runner.config.vocab_size)
        parts = scheduler.next_parts(chunk, limit, captures)
        self._vacate()
        if not parts:
            return False
        first, start = parts[0][0], parts[0][0].cached
        fed = [(s, max(0, min(count, len(s.prompt) - s.cached))) for s, count in parts]
        logits = runner.forward(runner.batch(parts, first.asks_for_prompt))
        whole = list(scheduler.queued(parts))
        work = _Pass(fed, [(s, s.life) for s in whole], first=start)
        if first.asks_for_prompt:
            assert logits is not None
            work.asked = self._asked(first, start, logits)
            logits = logits[-1:]
        if whole and len(whole[0].tokens) < whole[0].limit:
            assert logits is not None
            work.outs = runner.draw(whole, logits)
        for s in whole:
            s.ahead = 1
        self._flying.append(work)
        return True

    def _asked(self, s: SequenceState, start: int, logits: Array) -> Fetch | None:
        """The logits of the tokens from ``start`` on, or the scores of those that follow them in the prompt, if any."""
        if s.every_logit:
            return self.runner.backend.fetch([logits])
        following = s.prompt[start + 1 : start + 1 + len(logits)]
        top = s.params.prompt_logprobs or 0
        return self.runner.score(logits[: len(following)], following, top) if following else None

    # -- the decode loop

    def _join(self) -> None:
        """Let sequences whose prompts are through draw by captured steps, in the loop that fits."""
        if not self.runner.backend.captures:
            return
        loop = self._loop
        joining = self._joining()
        if loop is None:
            if joining:
                self._change_loop()
            return
        free = [row for row, s in enumerate(loop.rows) if s is None]
        fits = len(joining) <= len(free) and loop.needs.cover(Needs.of(joining, self.runner.config.vocab_size))
        if not fits or self._misfit >= _PATIENCE or (len(free) == len(loop.rows) and not loop.in_flight):
            self._change_loop()
            return
        for row, s in zip(free, joining, strict=False):
            self._take_row(row, s)
            self.runner.join(loop, row, s)

    def _change_loop(self) -> None:
        """Read the steps that are queued, and go on in the loop that fits all that decode."""
        self._read_steps()
        old, self._loop, self._misfit = self._loop, None, 0
        if old is not None:
            for _, s in self._members(old):
                s.row = None
            self.runner.keep(old)
        members = self._joining()
        if members:
            for row, s in enumerate(members):
                self._take_row(row, s)
            self._loop = self.runner.loop(*self._fit())
            self.runner.begin(self._loop, members)

    def _joining(self) -> list[SequenceState]:
        """The sequences without a row that captured steps can go on with. They have the page of their last token; for
        that others may have lost theirs."""
        scheduler, found = self.scheduler, list[SequenceState]()
        for s in scheduler.running[:]:
            if s.row is None and s.finish_reason is None and scheduler.may_decode(s):
                if scheduler.make_room(s, len(s.tokens)):
                    found.append(s)
                self._vacate()
        return [s for s in found if s.pages]

    def _take_row(self, row: int, s: SequenceState) -> None:
        s.row, s.until = row, len(s.tokens) + self.scheduler.steps_left(s)
        self._best = None

    def _fit(self) -> tuple[int, Needs]:
        """Rows and needs of the loop that fits the sequences that have a row, and those that will want one: up to a few
        times as many, for a loop of each size has to be captured, and rows that nobody has cost time, too."""
        members = [s for s in self.scheduler.running if s.row is not None]
        coming = sum(s.row is None and self._will_decode(s) for s in self.scheduler.running)
        rows = len(members) + min(coming, max(_LEAST_ROOM, _ROOM * len(members)))
        return padded_sequences(rows), Needs.of(members, self.runner.config.vocab_size)

    @staticmethod
    def _will_decode(s: SequenceState) -> bool:
        """Whether a sequence whose tokens so far are still read by passes will want a row."""
        unread = not s.generated or s.cached < len(s.tokens) - 1
        return unread and not s.every_logit and s.limit > len(s.tokens) + 1

    def _queue_step(self) -> bool:
        """Queue a decode step, if there is a sequence for it."""
        loop = self._loop
        if loop is None or (self._news.drawn if loop.needs.masked else loop.in_flight >= AHEAD):
            return False
        for row, s in self._members(loop):
            length = len(s.tokens) + s.ahead
            if s.finish_reason is not None or length >= s.until:
                self._leave(s)  # its last token is on its way, or the next has another rotation
            elif min(length + 1, s.until) > len(s.pages) * PAGE:  # a step makes the place of the token after its own
                self._grow(loop, row, s, min(length + 1, s.until))
        members = [(row, s, s.life) for row, s in self._members(loop)]
        if not members:
            return False
        loop.launch()
        if loop.needs.masked:
            self._read_steps()  # their tokens decide the masks
            loop.finish()
        for _, s, life in members:
            s.ahead += s.life == life
        self._flying.append(_Step(members))
        self._best = self._best or self._fit()
        self._misfit = self._misfit + 1 if self._best != (loop.sequences, loop.needs) else 0
        return True

    @staticmethod
    def _members(loop: DecodeLoop) -> Iterator[tuple[int, SequenceState]]:
        return ((row, s) for row, s in enumerate(loop.rows) if s is not None)

    def _grow(self, loop: DecodeLoop, row: int, s: SequenceState, tokens: int) -> None:
        """Give a sequence the page that its next token goes to; it or others may lose all of theirs."""
        owned = len(s.pages)
        if self.scheduler.make_room(s, tokens):
            loop.set_pages(row, s.pages, owned)
        self._vacate()

    def _vacate(self) -> None:
        """Those who have lost their pages have no row in the loop any more."""
        if self._loop is not None:
            gone = [row for row, s in self._members(self._loop) if s.row != row]
            for row in gone:
                self._loop.leave(row)
                self._best = None

    def _leave(self, s: SequenceState) -> None:
        if s.row is not None and self._loop is not None:
            self._loop.leave(s.row)
            s.row = self._best = None

    # -- reading

    def _read_steps(self) -> None:
        """Read until no decode step is in flight."""
        while any(isinstance(work, _Step) for work in self._flying):
            self._read_oldest()

    def _read_oldest(self) -> None:
        work = self._flying.popleft()
        if isinstance(work, _Pass):
            self._read_pass(work)
            return
        assert self._loop is not None
        self.steps += 1
        outs = self._loop.read()
        tokens = drawn_tokens([(row, s) for row, s, _ in work.rows], outs)
        for (_, s, life), token in zip(work.rows, tokens, strict=True):
            if s.life == life:
                s.cached = len(s.tokens)
                self._accept(s, token)

    def _read_pass(self, work: _Pass) -> None:
        self.steps += 1
        if work.asked is not None:
            self._read_asked(work.fed[0][0], work.first, work.asked.wait())
        outs = work.outs.wait() if work.outs is not None else None
        self._news.fed += work.fed
        self.prompt_tokens += sum(count for _, count in work.fed)
        rows = list(enumerate(s for s, _ in work.whole))
        tokens = drawn_tokens(rows, outs) if outs is not None else [None] * len(rows)
        for (s, life), token in zip(work.whole, tokens, strict=True):
            if s.life != life:
                continue
            if token is not None:
                self._accept(s, token)
            else:
                s.finish_reason = s.finish_reason or "length"
                self._end(s)

    def _read_asked(self, s: SequenceState, first: int, outs: list[np.ndarray[Any, Any]]) -> None:
        """Logits or scores of a prompt; those that the caller has, from before the sequence lost its pages, are left
        out."""
        count = len(outs[0])
        new = slice(max(0, s.told - first), count)
        s.told = max(s.told, first + count)
        if s.every_logit:
            if new.start < count:
                self._news.logits.append((s, outs[0][new]))
            return
        top = s.params.prompt_logprobs or 0
        for i in range(count)[new]:
            ids, logprobs, top_ids, best = (a[i] for a in outs)
            pairs = tuple((int(k), float(v)) for k, v in zip(top_ids[:top], best[:top], strict=True))
            s.prompt_scores.append(Token(int(ids), float(logprobs), pairs))

    def _accept(self, s: SequenceState, token: Token) -> None:
        """Append a drawn token to a sequence that goes on, and see whether it ends with it."""
        s.ahead -= 1
        if s.finish_reason is not None:
            return
        if s.constraint is not None and s.constraint.error is not None:
            s.error, s.finish_reason = s.constraint.error, "error"  # its mask could not be made
        elif token.id < 0:
            s.error = not_finite(f"the logits after {len(s.tokens)} tokens", dtype_name(self.runner.backend.dtype))
            s.finish_reason = "error"
        else:
            s.tokens.append(token.id)
            self.generated += 1
            self._news.drawn.append((s, token))
            if token.id in s.stop_ids:
                s.finish_reason = "stop"
            elif s.constraint is not None:
                s.constraint.accept(token.id)
                if s.constraint.finished:
                    s.error = s.constraint.error
                    s.finish_reason = "stop" if s.error is None else "error"
            if s.finish_reason is None and len(s.tokens) >= s.limit:
                s.finish_reason = "length"
        if s.finish_reason is not None:
            self._end(s)

    def _end(self, s: SequenceState) -> None:
        self.drop(s)
        self._news.ended.append(s)
