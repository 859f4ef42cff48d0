"""What a step is given: the tokens of a few rows in one, with their documents, targets and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import Array

__all__ = ["Batch"]

Ints = np.ndarray[tuple[int], np.dtype[np.int32]]
Floats = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class Batch:
    """A packed batch of n tokens: documents are sequences of their own, and none attends to another.

    input_ids, positions, targets: int32 [n]; positions begin at 0 with each document and each row. weights: float32
    [n], what the loss of each target counts: 0, or 1 / (learned targets of the whole step), so that the losses of all
    batches of a step add up to the mean. cu_seqlens: int32, where the documents begin, and n, which is repeated up to a
    power of two: empty sequences, so that few sizes occur. learned: targets that count.
    """

    input_ids: Ints
    positions: Ints
    targets: Ints
    weights: Floats
    cu_seqlens: Ints
    learned: int

    @property
    def tokens(self) -> int:
        """n."""
        return len(self.input_ids)

    def arrays(self) -> dict[str, Array]:
        """The inputs of the step's nodes by name.

        ``input_ids.order`` and ``positions.order``, int32 [n], sort ids and positions, equal ones in their order: the
        gradients of embeddings add up their rows in it.
        """
        found: dict[str, Array] = {
            "input_ids": self.input_ids,
            "positions": self.positions,
            "targets": self.targets,
            "weights": self.weights,
            "cu_seqlens": self.cu_seqlens,
        }
        return {**found, **{f"{name}.order": _order(found[name]) for name in ("input_ids", "positions")}}

    @classmethod
    def pack(cls, rows: Any, begins: Any, targets: Any, learned: Any, total: int) -> Batch:
        """Of rows of equal length: token ids, targets [B, T] of any integers, whether a token begins a document and
        whether a target counts, bool [B, T]. total: targets that count in the whole step."""
        begins = np.array(begins, bool)
        begins[:, 0] = True
        begins = begins.reshape(-1)
        n = begins.size
        starts = np.flatnonzero(begins)
        size = 1 << len(starts).bit_length()  # the first power of two that has room for the starts and an n
        cu_seqlens = np.full(size, n, np.int32)
        cu_seqlens[: len(starts)] = starts
        positions = np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))
        weights = np.where(np.reshape(learned, -1), np.float32(1.0 / max(1, total)), np.float32(0))
        return cls(_ints(rows), _ints(positions), _ints(targets), weights, cu_seqlens, int(np.count_nonzero(learned)))


def _ints(values: Any) -> Ints:
    return np.ascontiguousarray(np.reshape(values, -1), np.int32)


def _order(values: Ints) -> Ints:
    return np.argsort(values, kind="stable").astype(np.int32)
