"""Which sizes of batches are captured as CUDA graphs, and which captured graphs are kept: for prompts and decode steps.

A captured graph serves batches of one size only. So batches are padded to a few sizes, and of the captured graphs those
that were used last are kept, up to a bound on their memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

__all__ = [
    "LONG_PASS",
    "MAX_PASSES",
    "MAX_STEPS",
    "STEP_SIZES",
    "GraphCache",
    "max_logits",
    "padded_prompts",
    "padded_rows",
    "padded_sequences",
]

# Captured decode steps that are kept at most. While a batch grows to 512 sequences it uses a step of each of 28 sizes;
# 40 leave room for some with other sampling parameters.
MAX_STEPS = 40

# A pass of more tokens is long: it saves a hundredth of the time, and makes others wait. 512 prompts of 512 tokens on
# the 8B and an H200 give 7,087 output tokens/s where passes have 8,192 tokens, 6,982 where they have 4,096.
LONG_PASS = 4096

# Captured passes over prompts that are kept at most. They share their memory, which is that of the largest.
MAX_PASSES = 64

# (limit, multiple): a pass of up to ``limit`` rows is padded to a multiple of ``multiple`` rows, a longer one to a
# multiple of the last. A matrix product computes tiles of 128 rows, so finer multiples would save little work there.
_ROW_MULTIPLES = ((64, 16), (128, 32), (512, 64))
_LAST_ROW_MULTIPLE = 128

# Decode steps are captured for these numbers of sequences, and beyond them for multiples of 32; passes over prompts for
# powers of two: there a sequence that pads a pass costs next to nothing.
STEP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


def padded_rows(rows: int) -> int:
    """The rows (new tokens) of the captured pass that serves a batch of this many."""
    multiple = next((multiple for limit, multiple in _ROW_MULTIPLES if rows <= limit), _LAST_ROW_MULTIPLE)
    return -(-rows // multiple) * multiple


def padded_sequences(sequences: int) -> int:
    """The rows of the captured step that serves a batch of this many sequences."""
    return next((s for s in STEP_SIZES if s >= sequences), -(-sequences // 32) * 32)


def padded_prompts(sequences: int) -> int:
    """The sequences of the captured pass that serves a batch of this many."""
    return 1 << max(0, sequences - 1).bit_length()


def max_logits(vocab_size: int) -> int:
    """Rows of logits that one pass may make where the logits of all tokens are asked for: 256 MiB of float32."""
    return max(1, (256 << 20) // 4 // vocab_size)


class _Closable(Protocol):
    def close(self) -> None: ...


_Graph = TypeVar("_Graph", bound=_Closable)


class GraphCache(Generic[_Graph]):
    """Captured graphs by size, the ``most`` that were used last.

    A graph is taken out while it is in use.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: dict[Hashable, _Graph] = {}
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
        return self._kept.pop(size, None)

    def keep(self, size: Hashable, graph: _Graph) -> None:
        """Keep a graph for later; if there are too many, the one that was not used for longest is closed, and its size
        counts as new."""
        self._kept[size] = graph
        if len(self._kept) > self.most:
            oldest = next(iter(self._kept))
            self._kept.pop(oldest).close()
            self._met.discard(oldest)

    def close(self) -> None:
        """Close all graphs that are not in use; every size counts as new."""
        for graph in self._kept.values():
            graph.close()
        self._kept.clear()
        self._met.clear()
