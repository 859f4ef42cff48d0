"""Which sequences run together, and which of their tokens go into the next pass.

Of a run's sequences as many are admitted, in order, as the cache has room for at their full length beside other runs,
one at least; the rest waits until they have ended. How runs share the cache is told in ``sharing.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name
from ..errors import DeviceError
from .graphs import max_logits
from .kv_cache import PAGE, pages_for
from .runner import Runner
from .sampler import drawn_tokens
from .sequence import SequenceState, Token
from .sharing import Run, Sharing

__all__ = ["Drawn", "Progress", "Scheduler", "not_finite"]

Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
Drawn = list[tuple[SequenceState, Token]]  # what one step drew, for the sequences that had not ended


def not_finite(logits: str, dtype: str) -> DeviceError:
    """The error for logits that nothing can be made of."""
    return DeviceError(f"{logits} are not finite in {dtype}; --dtype float32 may help, or a weight is damaged")


class Scheduler:
    """Runs sequences on a runner until they end. context: tokens a sequence may have; sharing: of the cache."""

    def __init__(self, runner: Runner, context: int) -> None:
        self.runner, self.context = runner, context
        self.sharing = Sharing(runner.cache)

    def run(
        self, sequences: Sequence[SequenceState], progress: Progress | None = None, run: Run | None = None
    ) -> Generator[Drawn]:
        """Draw tokens until every sequence has a finish_reason; yields the tokens of each step.

        run: what is known of this run, a new one by default. Between two steps, and while progress is told, it may lose
        its pages to another. Raises DeviceError if the model computes no logits to draw from, and ClosedError if the
        model is closed meanwhile.
        """
        waiting, run = deque(sequences), run or Run()
        while waiting:
            run.sequences, run.most = self._admit(waiting, run)
            with self.sharing.entered(run):
                active = [s for s in run.sequences if s.finish_reason is None]
                while active:
                    logits = self.last_logits(active, progress, run)
                    yield self._accept(active, self.runner.draw(active, logits))
                    active = self._still_active(active)
                    while steps := self._steps_alike(active):
                        yield from self._decode(active, steps, run)
                        active = self._still_active(active)
                    progress = None

    def _admit(self, waiting: deque[SequenceState], run: Run) -> tuple[list[SequenceState], int]:
        """The next sequences that fit into the cache together, one at least, and the pages that they may need."""
        admitted, room = [waiting.popleft()], self.sharing.room(run)
        pages = pages_for(self.longest(admitted[0]))
        while waiting and pages + (need := pages_for(self.longest(waiting[0]))) <= room:
            pages += need
            admitted.append(waiting.popleft())
        for s in admitted:
            if len(s.prompt) >= self.longest(s):
                s.finish_reason = "length"
        return admitted, pages

    def longest(self, s: SequenceState) -> int:
        """Tokens of this sequence at the end."""
        limit = s.params.max_tokens
        return self.context if limit is None else min(self.context, len(s.prompt) + limit)

    def last_logits(
        self, active: Sequence[SequenceState], progress: Progress | None = None, run: Run | None = None
    ) -> Array:
        """Feed what is not cached yet: the logits after the last token of each sequence, [len(active), vocab_size]."""
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            if progress is not None and done > told:
                told = done
                progress(done, total)

        parts: list[Array] = []
        while any(s.cached < len(s.tokens) for s in active):  # again, if the run was suspended in the middle
            parts = list(self.prefill(active, False, tell, run))
        if len(parts) == 1:
            return parts[0]
        backend = self.runner.backend
        return backend.upload(np.concatenate([backend.download(p) for p in parts]))

    def prefill(
        self,
        active: Sequence[SequenceState],
        all_logits: bool = False,
        progress: Progress | None = None,
        run: Run | None = None,
    ) -> Iterator[Array]:
        """Feed every token that is not cached yet, in passes of bounded size; yields the logits of each pass.

        A decode step without a captured graph is such a pass, of one token per sequence. It ends early if the run is
        suspended between two passes; then no token is cached.
        """
        run = run or Run()
        for s in active:
            if s.cached and any(
                rope.regime(s.cached) != rope.regime(len(s.tokens)) for rope in self.runner.config.ropes.values()
            ):
                s.cached = 0  # the keys were rotated with other frequencies: compute the sequence again
        self.sharing.take(run, [(s, len(s.tokens)) for s in active])
        suspensions, done, total = run.suspensions, 0, sum(len(s.tokens) - s.cached for s in active)
        max_rows = max(self.runner.backend.prefill_chunk, len(active) if total == len(active) else 0)
        if all_logits:
            max_rows = min(max_rows, max_logits(self.runner.config.vocab_size))
        while run.suspensions == suspensions and (parts := _next_parts(active, max_rows)):
            logits = self.runner.forward(self.runner.batch(parts, all_logits))
            for s, count in parts:
                s.cached += count
                done += count
            if progress is not None:
                progress(done, total)
            if logits is not None:
                yield logits

    def _accept(self, active: list[SequenceState], outs: Sequence[np.ndarray[Any, Any]]) -> Drawn:
        """Append the drawn tokens to the sequences that go on, and see which ones end with it."""
        pairs = zip(active, drawn_tokens(active, outs), strict=True)
        drawn = [(s, token) for s, token in pairs if s.finish_reason is None]
        for s, token in drawn:
            if token.id < 0:
                raise not_finite(f"the logits after {len(s.tokens)} tokens", dtype_name(self.runner.backend.dtype))
            s.tokens.append(token.id)
            if token.id in s.stop_ids:
                s.finish_reason = "stop"
            elif len(s.tokens) >= self.longest(s):
                s.finish_reason = "length"
        return drawn

    def _still_active(self, active: list[SequenceState]) -> list[SequenceState]:
        if ended := [s for s in active if s.finish_reason is not None]:
            self.sharing.release(ended)
        return [s for s in active if s.finish_reason is None]

    def _steps_alike(self, active: list[SequenceState]) -> int:
        """Decode steps that one captured step can do from here.

        0 without one, where the rotation changes next, or where keys are to be computed again.
        """
        if not active or not self.runner.backend.captures or any(s.cached < len(s.tokens) - 1 for s in active):
            return 0
        steps = [self.longest(s) - len(s.tokens) for s in active]
        steps += [rope.stable_steps(len(s.tokens)) for rope in self.runner.config.ropes.values() for s in active]
        return min(steps)

    def _decode(self, active: list[SequenceState], steps: int, run: Run) -> Iterator[Drawn]:
        """Replay up to ``steps`` decode steps, fewer if a sequence ends: what is in flight then is still read.

        Fewer too where the pages end that could be had, or if another run takes some of them; what is in flight then is
        drawn again.
        """
        self.sharing.take(run, [(s, min(self.longest(s), len(s.tokens) + 1)) for s in active])
        if not self._steps_alike(active):
            return  # it had to wait for the pages, and has lost those that it had
        self.sharing.take_ahead(run, [(s, self.longest(s)) for s in active])
        steps = min([steps, *(len(s.pages) * PAGE - len(s.tokens) for s in active)])
        key, loop = self.runner.begin_decode(active)
        run.end_loop = end_loop = partial(self.runner.end_decode, key, loop)
        launched = 0
        while run.end_loop is end_loop:
            going = all(s.finish_reason is None for s in active)
            while going and launched < steps and loop.in_flight < loop.ahead:
                loop.launch()
                launched += 1
            if not loop.in_flight:
                break
            outs = loop.read()
            for s in active:
                if s.finish_reason is None:
                    s.cached = len(s.tokens)
            if drawn := self._accept(active, outs):
                yield drawn
        run.leave_loop()


def _next_parts(active: Sequence[SequenceState], max_rows: int) -> list[tuple[SequenceState, int]]:
    """The next tokens of the sequences, in order, that one pass of so many rows takes; a prompt may be cut."""
    parts, room = [], max_rows
    for s in active:
        if count := min(room, len(s.tokens) - s.cached):
            parts.append((s, count))
            room -= count
    return parts
