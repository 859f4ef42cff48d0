"""Which sizes of batches are captured as graphs, and how long the graphs are kept: one policy for prompts and steps.

A captured graph serves batches of one size. So batches are padded to a few sizes, and the graphs that were used last
are kept, as long as their memory allows.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

__all__ = ["KEPT_CHUNKS", "MAX_STEPS", "Graphs", "max_logits", "padded_rows", "padded_sequences"]

MAX_STEPS = 20  # decode steps that are kept: as a batch of 64 or so shrinks, it needs one of every size

# Passes of a prompt are kept for this many times the rows of the largest pass: each has memory of its own for its
# activations, in proportion to its rows.
KEPT_CHUNKS = 2

# (limit, step): up to ``limit`` rows a pass is padded to a multiple of ``step``. 128 rows are a tile of a matrix
# product, so beyond them a smaller step would save little work.
_ROW_STEPS = ((64, 16), (128, 32), (512, 64))
_LAST_ROW_STEP = 128

# Decode steps are captured for these numbers of sequences, and beyond them for multiples of 32.
_SEQUENCES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


def padded_rows(rows: int) -> int:
    """New tokens of the captured pass that serves this many."""
    step = next((step for limit, step in _ROW_STEPS if rows <= limit), _LAST_ROW_STEP)
    return -(-rows // step) * step


def padded_sequences(sequences: int) -> int:
    """Sequences of the captured step or pass that serves this many."""
    return next((s for s in _SEQUENCES if s >= sequences), -(-sequences // 32) * 32)


def max_logits(vocab_size: int) -> int:
    """Rows of logits that a pass may make, where those of all tokens are asked for: 256 MB of float32."""
    return max(1, (1 << 26) // vocab_size)


class _Closable(Protocol):
    def close(self) -> None: ...


_Graph = TypeVar("_Graph", bound=_Closable)


class Graphs(Generic[_Graph]):
    """Captured graphs by size, kept for the next batch of that size while their costs add up to ``max_cost`` at most.

    A graph is taken out while it is in use, so that two streams that are open at once never share one. The graph that
    was not used for longest makes room for a new one.
    """

    def __init__(self, max_cost: int) -> None:
        self.max_cost = max_cost
        self._kept: dict[Hashable, tuple[_Graph, int]] = {}
        self._met: set[Hashable] = set()

    def __len__(self) -> int:
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
