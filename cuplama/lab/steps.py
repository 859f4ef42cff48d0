"""Long work, step by step: what comes next, and about how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["announced", "time_left"]

T = TypeVar("T")


def announced(items: Sequence[T], name: Callable[[T], str], say: Callable[[str], object]) -> Iterator[T]:
    """The items, one after the other; before each, ``say`` is told its number and name.

    From the second on it is also told how long the rest will take if it goes on as before. The time of a step is what
    the caller needs until it asks for the next item.
    """
    begin = time.perf_counter()
    for done, item in enumerate(items):
        say(f"{done + 1}/{len(items)}: {name(item)}{time_left(begin, done, len(items))}")
        yield item


def time_left(begin: float, done: int, total: int) -> str:
    """The words "(about 20 s left)" behind a space, or nothing where nothing is done or left.

    It is right if what is left takes as long as what is done.
    begin: ``time.perf_counter()`` at the start of the work.
    """
    if done in (0, total):
        return ""
    return f" (about {_duration((time.perf_counter() - begin) / done * (total - done))} left)"


def _duration(seconds: float) -> str:
    """Seconds below 100, then minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
