"""A weight of a checkpoint: tensors of mapped files, stacked, and the format that they are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .format import Format, plain_format

__all__ = ["Weight"]


@dataclass(frozen=True)
class Weight:
    """A canonical weight: one or more tensors of mapped files, their rows stacked along the first axis.

    source: the tensors' names; two weights with the same source are one (a tied head).
    """

    name: str
    source: tuple[str, ...]
    parts: tuple[np.ndarray[Any, Any], ...]

    @property
    def format(self) -> Format:
        """How the stored elements become numbers. Raises ValueError for a dtype that is no format."""
        return plain_format(self.dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored elements."""
        dtype: np.dtype[Any] = self.parts[0].dtype
        return dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stacked rows."""
        return (sum(len(p) for p in self.parts), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(p.nbytes for p in self.parts)

    def chunks(self, max_bytes: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """The weight in chunks of whole rows, of at most ``max_bytes`` unless a single row is longer.

        Yields (element offset in the row-major weight, contiguous 1-D array). A chunk is a view of the mapped file,
        except for a transposed tensor, which is copied.
        """
        offset = 0
        for part in self.parts:
            row = max(1, part.nbytes // max(1, len(part)))
            rows = max(1, max_bytes // row)
            for at in range(0, len(part), rows):
                chunk = np.ascontiguousarray(part[at : at + rows]).reshape(-1)
                yield offset, chunk
                offset += chunk.size

    def array(self) -> np.ndarray[Any, Any]:
        """The whole weight in its stored dtype: a view of the file where it is one tensor, a copy otherwise."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
