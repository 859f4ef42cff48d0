"""The calls that share an engine: what each waits for, and how it learns of it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .sequence import SequenceState, Token

__all__ = ["Call", "Drawn", "Progress"]

Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
Drawn = list[tuple[SequenceState, Token]]  # what one step drew, for the sequences that had not ended


class Call:
    """Sequences that one caller waits for. tell: called, from any thread, when there is something new to read.

    thread: that waits for it; error: what ended it before its time; asks_for_progress: whether ``progress`` is wanted.
    """

    def __init__(self, sequences: Sequence[SequenceState], tell: Callable[[], None] | None = None) -> None:
        self.sequences = sequences
        self.thread = threading.get_ident()
        self.error: BaseException | None = None
        self.progress: tuple[int, int] | None = None  # what is to be told of the prompts
        self.asks_for_progress, self._done = False, 0
        self._left = sum(s.finish_reason is None for s in sequences)
        self._news: deque[Drawn | np.ndarray[Any, Any]] = deque()
        self.waits = False  # for the turn to make steps, or for somebody else's
        # A lock that is open while there is something to look at. Unlike an Event it takes no lock of Python's own,
        # which the garbage collector, when it ends a forgotten stream in the middle of a wait, would wait for.
        self._ready = threading.Lock()
        self._ready.acquire()
        self._tell = tell or self._open

    def wait(self, seconds: float) -> None:
        """Until there is something new, or somebody is needed to make steps."""
        self._ready.acquire(timeout=seconds)

    def _open(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is open already
            self._ready.release()

    def wake(self) -> None:
        """Let the caller look again."""
        self._tell()

    def add(self, news: Drawn | np.ndarray[Any, Any]) -> None:
        """Something that the caller is to have."""
        self._news.append(news)

    def end(self, count: int = 1) -> None:
        """So many of the sequences have ended."""
        self._left -= count

    def tell_progress(self) -> None:
        """More of the prompts has been read. What is told never goes back, even if a sequence begins again."""
        if self.asks_for_progress:
            done = sum(len(s.prompt) if s.generated else min(s.cached, len(s.prompt)) for s in self.sequences)
            if done > self._done:
                self._done = done
                self.progress = done, sum(len(s.prompt) for s in self.sequences)

    def fail(self, error: BaseException) -> None:
        """The call cannot go on."""
        self.error = self.error or error

    @property
    def is_new(self) -> bool:
        """Whether there is something to read: a result, progress, an error or the end."""
        return self.has_results or self.progress is not None or self.ended

    @property
    def has_results(self) -> bool:
        """Whether ``read`` gives a result."""
        return bool(self._news)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._left <= 0 or self.error is not None

    def read(self) -> Drawn | np.ndarray[Any, Any] | None:
        """The oldest result; None if there is none. Raises ``error`` when those before it have been read."""
        if self._news:
            return self._news.popleft()
        if self.error is not None:
            raise self.error
        return None
