"""A weight of a checkpoint: tensors of mapped files, stacked, and the formats that they are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import DTYPES, dtype_name
from .fields import Field, element_plane
from .format import PLAIN_CODES, Format, plain_code_format, plain_format
from .stored import ExpertStack, Stack, Stored, expert_stack

__all__ = ["Experts", "Weight", "as_stored"]


@dataclass(frozen=True, eq=False)
class Experts:
    """The matrices of experts, or their biases, as they lie in mapped files: array-like, indexed by an expert's number.

    shape: [experts, rows, columns]; parts: arrays, as many for each expert, whose rows are its rows.
    """

    shape: tuple[int, ...]
    parts: tuple[np.ndarray[Any, Any], ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored elements."""
        dtype: np.dtype[Any] = self.parts[0].dtype
        return dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> np.ndarray[Any, Any]:
        """[rows, columns]: a view where one tensor holds them, else a copy."""
        each = len(self.parts) // len(self)
        own = self.parts[expert * each : (expert + 1) * each]
        return own[0] if each == 1 else np.concatenate(own)


@dataclass(frozen=True)
class Weight:
    """A canonical weight: one or more tensors of mapped files, their rows stacked along the first axis.

    source: the tensors' names; two weights with the same source are one (a tied head). parts: arrays of numbers, or
    quantised matrices. experts: how many experts share the rows, 0 for a weight without such an axis; wide: whether a
    device holds it in float32, whatever the model's dtype.
    """

    name: str
    source: tuple[str, ...]
    parts: tuple[np.ndarray[Any, Any] | Stored, ...]
    experts: int = 0
    wide: bool = False

    @property
    def packed(self) -> bool:
        """Whether any part is quantised: then a device holds the weight in blocks."""
        return any(isinstance(p, Stored) for p in self.parts)

    @property
    def formats(self) -> tuple[Format, ...]:
        """How the parts' elements become numbers, each once. Raises ValueError for a dtype that is no format."""
        return tuple(dict.fromkeys(p.format if isinstance(p, Stored) else plain_format(p.dtype) for p in self.parts))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored elements of a weight that is not packed."""
        (first, *_) = self.parts
        assert not isinstance(first, Stored)
        dtype: np.dtype[Any] = first.dtype
        return dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stacked rows, with the axis of experts in front."""
        rows, rest = sum(len(p) for p in self.parts), self.parts[0].shape[1:]
        return (self.experts, rows // self.experts, *rest) if self.experts else (rows, *rest)

    @property
    def elements(self) -> int:
        """How many there are."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(p.nbytes for p in self.parts)

    def device_bytes(self, dtype: np.dtype[Any]) -> int:
        """Bytes on a device where plain weights have that dtype."""
        if not self.packed:
            return self.elements * self.device_dtype(dtype).itemsize
        segments = self.stored(dtype).segments
        return sum(s.data.nbytes + (0 if s.order is None else s.order.nbytes) for s in segments)

    def device_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """What a device holds a plain weight in, where the model has that dtype."""
        return DTYPES["f32"] if self.wide else dtype

    def stored(self, dtype: np.dtype[Any]) -> Stack | Stored | ExpertStack:
        """A packed weight as one array-like value; plain parts are of that dtype in it."""
        parts = tuple(p if isinstance(p, Stored) else as_stored(p, dtype) for p in self.parts)
        if self.experts:
            return expert_stack(parts, self.experts)
        return parts[0] if len(parts) == 1 else Stack(parts)

    def chunks(self, max_bytes: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """A weight that is not packed, in chunks of whole rows, of at most ``max_bytes`` unless a row is longer.

        Yields (element offset in the row-major weight, contiguous 1-D array). A chunk is a view of the mapped file,
        except for a transposed tensor, which is copied.
        """
        offset = 0
        for part in self.parts:
            assert not isinstance(part, Stored)
            row = max(1, part.nbytes // max(1, len(part)))
            rows = max(1, max_bytes // row)
            for at in range(0, len(part), rows):
                chunk = np.ascontiguousarray(part[at : at + rows]).reshape(-1)
                yield offset, chunk
                offset += chunk.size

    def array(self) -> np.ndarray[Any, Any]:
        """The whole of a weight that is not packed, in its stored dtype: a view of the file where it is one tensor, a
        copy otherwise."""
        parts = [p for p in self.parts if not isinstance(p, Stored)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.reshape(self.shape) if self.experts else whole

    def mapped(self) -> np.ndarray[Any, Any] | Experts:
        """The same for references that read it piece by piece: of experts nothing is copied until one is asked for."""
        parts = tuple(p for p in self.parts if not isinstance(p, Stored))
        return Experts(self.shape, parts) if self.experts else self.array()


def as_stored(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Stored:
    """A plain matrix as one whose codes are its elements, which have that dtype: to be packed beside quantised ones."""
    plain = np.ascontiguousarray(plain_format(array.dtype).decode(array).astype(dtype, copy=False))
    assert dtype in (DTYPES[name] for name in PLAIN_CODES)
    form = plain_code_format(dtype_name(dtype))
    m, k = plain.shape
    return Stored((m, k), form, {"code": Field((element_plane(plain),))}, array.nbytes)
