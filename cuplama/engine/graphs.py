"""Which sizes of batches are captured as CUDA graphs, and which captured graphs are kept: for prompts and decode steps.

A captured graph serves batches of one size only. So batches are padded to a few sizes, and of the captured graphs those
that were used last are kept, up to a bound on their memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

__all__ = ["KEPT_CHUNKS", "MAX_STEPS", "GraphCache", "max_logits", "padded_rows", "padded_sequences"]

# Captured decode steps that are kept at most. While a batch shrinks from 64 sequences to one it uses a step of each of
# the 14 sizes below; 20 leave room for a few with other sampling parameters.
MAX_STEPS = 20

# Captured passes over prompts are kept while their rows together are at most this many times the rows of the largest
# pass: each has memory of its own for its activations, in proportion to its rows.
KEPT_CHUNKS = 2

# (limit, multiple): a pass of up to ``limit`` rows is padded to a multiple of ``multiple`` rows, a longer one to a
# multiple of the last. A matrix product computes tiles of 128 rows, so finer multiples would save little work there.
_ROW_MULTIPLES = ((64, 16), (128, 32), (512, 64))
_LAST_ROW_MULTIPLE = 128

# Decode steps are captured for these numbers of sequences, and beyond them for multiples of 32.
_SEQUENCES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


def padded_rows(rows: int) -> int:
    """The rows (new tokens) of the captured pass that serves a batch of this many."""
    multiple = next((multiple for limit, multiple in _ROW_MULTIPLES if rows <= limit), _LAST_ROW_MULTIPLE)
    return -(-rows // multiple) * multiple


def padded_sequences(sequences: int) -> int:
    """The sequences of the captured step or pass that serves a batch of this many."""
    return next((s for s in _SEQUENCES if s >= sequences), -(-sequences // 32) * 32)


def max_logits(vocab_size: int) -> int:
    """Rows of logits that one pass may make where the logits of all tokens are asked for: 256 MiB of float32."""
    return max(1, (256 << 20) // 4 // vocab_size)


class _Closable(Protocol):
    def close(self) -> None: ...


_Graph = TypeVar("_Graph", bound=_Closable)


class GraphCache(Generic[_Graph]):
    """Captured graphs by size, kept for the next batch of that size while their costs add up to ``max_cost`` at most.

    max_cost: in the unit of the costs that ``keep`` is given: a decode step costs 1, a pass over prompts its rows.
    A graph is taken out while it is in use, so that two streams that are open at once never share one. The graph that
    was not used for longest makes room for a new one.
    """

    def __init__(self, max_cost: int) -> None:
        self.max_cost = max_cost
        self._kept: dict[Hashable, tuple[_Graph, int]] = {}
        self._met: set[Hashable] = set()

    def __len__(self) -> int:
        """How many graphs are kept; one that is in use is not among them."""
        return len(self._kept)

    @property
    def sizes(self) -> list[Hashable]:
        """The sizes of the graphs that are kept, the one that was not used for longest first."""
        return list(self._kept)

    def first_time(self, size: Hashable) -> bool:
        """Whether a batch of this size comes for the first time; the first may be the last, so it is not captured."""
        if size in self._met:
            return False
        self._met.add(size)
        return True

    def take(self, size: Hashable) -> _Graph | None:
        """The graph of that size, which is the caller's until ``keep``; None if there is none."""
        found = self._kept.pop(size, None)
        return None if found is None else found[0]

    def make_room(self, cost: int) -> None:
        """Close graphs until another of that cost may be kept. A size whose graph is closed counts as new."""
        while self._kept and cost + sum(c for _, c in self._kept.values()) > self.max_cost:
            oldest = next(iter(self._kept))
            self._kept.pop(oldest)[0].close()
            self._met.discard(oldest)

    def keep(self, size: Hashable, graph: _Graph, cost: int = 1) -> None:
        """Keep a graph for later. One that another of its size has replaced meanwhile is closed."""
        if size in self._kept:
            graph.close()
            return
        self.make_room(cost)
        self._kept[size] = graph, cost

    def close(self) -> None:
        """Close all graphs that are not in use; every size counts as new."""
        for graph, _ in self._kept.values():
            graph.close()
        self._kept.clear()
        self._met.clear()
