"""Which tokens a step gets: windows of the stream, in a new order in every epoch, as a function of seed and step alone.

Nothing of it has to be saved for a run that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import PromptError
from .batch import Batch, padded_bounds
from .data import TokenData
from .documents import BEGINS, LEARNED

__all__ = ["Windows", "evaluation_batches"]

Starts = np.ndarray[tuple[int], np.dtype[np.int64]]


class Windows:
    """Rows of T tokens, each with the token that follows it.

    The windows of an epoch lie side by side from a place on that differs from epoch to epoch, so that texts are not
    always cut at the same places; the first begins with the stream, and the last ends with it. One in which nothing is
    learned gives way to the next in the order.
    """

    def __init__(self, data: TokenData, length: int, batch_size: int, accumulate: int, seed: int) -> None:
        """length: T; batch_size: rows of a batch; accumulate: batches of a step. Raises PromptError for fewer than
        T + 1 tokens, and for data of which nothing is learned."""
        tokens = len(data.tokens)
        if tokens < length + 1:
            raise PromptError(
                f"the data has {tokens} tokens, and a row of {length} needs {length + 1}, with the one that follows it:"
                " add data, or give a smaller context"
            )
        if not data.targets:
            raise PromptError("the data has no token that is learned")
        self._data, self._length, self._seed = data, length, seed
        self._rows, self._batches = batch_size, accumulate
        self.count = -(-(tokens - 1) // length) + 1
        """Windows of an epoch."""
        self._epoch = lru_cache(maxsize=2)(self._starts)

    def step(self, step: int) -> list[Batch]:
        """The batches of a step, counted from 1."""
        first = (step - 1) * self._batches * self._rows
        starts = [self._start(i) for i in range(first, first + self._batches * self._rows)]
        return _batches(self._data, starts, self._length, self._rows)

    def _start(self, row: int) -> int:
        """Where a row begins; rows are counted through all steps."""
        epoch, place = divmod(row, self.count)
        starts, flags = self._epoch(epoch), self._data.flags
        candidates = (int(starts[(place + i) % self.count]) for i in range(self.count))
        return next(s for s in candidates if (flags[s + 1 : s + self._length + 1] & LEARNED).any())

    def _starts(self, epoch: int) -> Starts:
        """Where the windows of an epoch begin, in their order: int64 [count]."""
        bits = np.random.Philox(key=np.array([self._seed, epoch], np.uint64))  # NumPy keeps its raw bits as they are
        drawn = np.asarray(bits.random_raw(self.count + 1))
        shift = int(drawn[-1] % np.uint64(self._length)) + 1
        starts = shift + self._length * np.arange(-1, self.count - 1)
        inside = np.clip(starts, 0, len(self._data.tokens) - 1 - self._length)
        return inside[np.argsort(drawn[:-1], kind="stable")]


def evaluation_batches(data: TokenData, length: int, batch_size: int) -> Iterator[Batch]:
    """All targets of a data set that are learned, each once, in batches like those of the steps.

    Their weights are 1 / (learned targets of the data set): the sum of all losses is their mean. Raises PromptError
    where there are none.
    """
    tokens, total = len(data.tokens), data.targets
    if not total:
        raise PromptError("the data for evaluation has no token whose prediction could be judged")
    starts = list(range(0, tokens - 1, length))
    for at in range(0, len(starts), batch_size):
        some = starts[at : at + batch_size]
        yield _packed(data, [*some, *[tokens] * (batch_size - len(some))], length, total)


def _batches(data: TokenData, starts: Sequence[int], length: int, rows: int) -> list[Batch]:
    flags = [np.asarray(data.flags[s + 1 : s + length + 1]) for s in starts]
    total = sum(int(np.count_nonzero(f & LEARNED)) for f in flags)
    return [_packed(data, starts[at : at + rows], length, total) for at in range(0, len(starts), rows)]


def _packed(data: TokenData, starts: Sequence[int], length: int, total: int) -> Batch:
    """The batch of rows from these places on; behind the end of the data there are tokens 0 that do not count.

    total: targets that count in the whole step, each by 1 / total.
    """
    ids, flags = (np.stack([_row(array, s, length) for s in starts]) for array in (data.tokens, data.flags))
    begins = (flags[:, :-1] & BEGINS != 0) & data.apart
    begins[:, 0] = True  # a row sees nothing of the one before it
    first, n = np.flatnonzero(begins), begins.size
    positions = np.arange(n) - np.repeat(first, np.diff(np.append(first, n)))
    weights = np.where(flags[:, 1:] & LEARNED != 0, np.float32(1 / total), np.float32(0)).reshape(-1)
    inputs, places, targets = (
        np.ascontiguousarray(x, np.int32).reshape(-1) for x in (ids[:, :-1], positions, ids[:, 1:])
    )
    return Batch(inputs, places, targets, weights, padded_bounds(first.tolist(), n))


def _row(array: Any, start: int, length: int) -> Any:
    row = np.asarray(array[start : start + length + 1])
    return row if len(row) > length else np.pad(row, (0, length + 1 - len(row)))
