"""The inputs of a training pass: tokens of several documents, one behind the other, and what is learned of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ParameterError
from ..models.rope import RotationTables, Span

__all__ = ["Batch", "padded_bounds"]

_Ints = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Batch:
    """n tokens of some documents, which do not see each other.

    input_ids, positions, targets [n] int32: a token, its position in its document, and the token that follows; weights
    [n] float32: what the loss of the token counts, 0 for one that is not learned; bounds [b+1] int32: where documents
    begin, and n at the end; a document may be empty, so that batches of many numbers of documents have one shape.
    order, position_order [n] int32: what sorts input_ids and positions, equal ones in their order: the gradients of
    embeddings are added up in it.
    """

    input_ids: _Ints
    positions: _Ints
    targets: _Ints
    weights: np.ndarray[Any, np.dtype[np.float32]]
    bounds: _Ints
    order: _Ints = field(init=False)
    position_order: _Ints = field(init=False)

    def __post_init__(self) -> None:
        """Sort them here: the host makes a batch while the device is busy with the one before."""
        object.__setattr__(self, "order", np.argsort(self.input_ids, kind="stable").astype(np.int32))
        object.__setattr__(self, "position_order", np.argsort(self.positions, kind="stable").astype(np.int32))

    @property
    def rows(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @classmethod
    def of_rows(cls, token_ids: np.ndarray[Any, Any] | Sequence[Sequence[int]]) -> Batch:
        """From token_ids [B, T+1]: each row is a document, all of whose tokens but the first are learned alike.

        Raises ParameterError for another shape, and for what are no whole numbers.
        """
        token_ids = np.asarray(token_ids)
        shape = token_ids.shape
        if len(shape) != 2 or token_ids.dtype.kind not in "iu" or shape[0] < 1 or shape[1] < 2:
            raise ParameterError(
                f"token_ids is {token_ids.dtype} {list(shape)}; it must be int [B, T+1], T of 1 or more"
            )
        count, width = shape
        n = count * (width - 1)
        return cls(
            input_ids=token_ids[:, :-1].astype(np.int32).reshape(-1),
            positions=np.tile(np.arange(width - 1, dtype=np.int32), count),
            targets=token_ids[:, 1:].astype(np.int32).reshape(-1),
            weights=np.full(n, 1 / n, np.float32),
            bounds=(np.arange(count + 1) * (width - 1)).astype(np.int32),
        )

    def check(self, vocab_size: int, context: int) -> None:
        """Raise ParameterError for what a kernel would look up beyond the end of a table.

        vocab_size: of the model; context: tokens of a document at most.
        """
        lengths = np.diff(self.bounds)
        if not self.rows or (self.bounds[0], self.bounds[-1]) != (0, self.rows) or lengths.min() < 0:
            raise ParameterError(f"bounds of a batch go from 0 to its {self.rows} tokens, at least one, and never down")
        longest = max(int(lengths.max()), int(self.positions[self.position_order[-1]]) + 1)
        if longest > context or self.positions[self.position_order[0]] < 0:
            raise ParameterError(f"a document of a batch has {longest} tokens; context = {context} is the most")
        for ids in (self.input_ids, self.targets):
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ParameterError(f"a batch has token ids {ids.min()} to {ids.max()}; ids are 0 to {vocab_size - 1}")

    def arrays(self, rotations: RotationTables) -> dict[str, np.ndarray[Any, Any]]:
        """What the nodes read, by name. rotations: the model's tables."""
        lengths = np.diff(self.bounds)
        _, rows = rotations.lookup([Span(0, int(n), int(n)) for n in lengths if n])
        return {
            "input_ids": self.input_ids,
            "input_ids.order": self.order,
            "positions": self.positions,
            "positions.order": self.position_order,
            "rope.rows": rows,
            "targets": self.targets,
            "weights": self.weights,
            "cu_seqlens": self.bounds,
        }


def padded_bounds(starts: Sequence[int], rows: int) -> _Ints:
    """The bounds of documents that begin at ``starts``, the last of which ends at ``rows``.

    Empty documents behind them make their number a power of two, so that few shapes occur.
    """
    size = 1 << (len(starts) - 1).bit_length()
    found = np.full(size + 1, rows, np.int32)
    found[: len(starts)] = starts
    return found
