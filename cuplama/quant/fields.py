"""Numbers in the bytes of a checkpoint: where each code, scale and zero point of a matrix lies.

Every layout in use, of AutoAWQ, GPTQ, compressed-tensors, bitsandbytes or GGUF, packs its codes so that the place of
one is a sum: what its row adds, and what its column adds. A layout is then two tables of whole numbers, and one gather,
on NumPy or on a GPU (cuda_src/pack.cu), reads them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..dtypes import Array

__all__ = ["Field", "Plane", "bytes_of", "element_plane", "word_plane"]

Rows = Array | slice


@dataclass(frozen=True, eq=False)
class Plane:
    """Bits of the numbers of a matrix: those of (row, column) begin at bit ``rows[row] + columns[column]`` of ``data``.

    data: uint8 [bytes], a view of the mapped file; bits: of a number, 1, 2, 4, 8, 16 or 32. Bits count from the lowest
    of the first byte on. Less than a byte lies within one byte; more begins at a byte. rows: int64 [m]; columns: int64.
    """

    data: np.ndarray[Any, Any]
    bits: int
    rows: np.ndarray[Any, Any]
    columns: np.ndarray[Any, Any]

    def read(self, rows: Rows) -> np.ndarray[Any, Any]:
        """The bits of some rows, uint32 [rows, columns]."""
        by_words = self._read_words(self.rows[rows])
        if by_words is not None:
            return by_words
        at: np.ndarray[Any, Any] = self.rows[rows][:, None] + self.columns[None, :]
        if self.bits < 8:
            bits = self.data[at >> 3] >> (at & 7).astype(np.uint8)
            return np.asarray(bits & np.uint8((1 << self.bits) - 1), np.uint32)
        at >>= 3
        found: np.ndarray[Any, Any] = self.data[at].astype(np.uint32)
        for byte in range(1, self.bits // 8):
            found |= self.data[at + byte].astype(np.uint32) << (8 * byte)
        return found

    def _read_words(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """As ``read``, from where rows begin. Each word of 32 bits is looked up once for all its numbers: four times as
        fast. None unless every number lies within a word, and its place there is a matter of rows or columns alone."""
        row, column = rows & 31, self.columns & 31
        inner, outer = (row, column) if row.any() else (column, row)
        whole = self.data.size % 4 == 0 and self.data.ctypes.data % 4 == 0 and self.data.flags.c_contiguous
        if not whole or outer.any() or inner.max(initial=0) + self.bits > 32:
            return None
        axis = 0 if inner is row else 1
        places, which = np.unique((rows, self.columns)[axis] >> 5, return_inverse=True)
        first, second = (places, self.columns >> 5) if axis == 0 else (rows >> 5, places)
        words: np.ndarray[Any, Any] = self.data.view(np.uint32)[first[:, None] + second]
        found: np.ndarray[Any, Any] = words.take(which, axis)
        found >>= np.expand_dims(inner.astype(np.uint32), 1 - axis)
        found &= np.uint32((1 << self.bits) - 1)
        return found


@dataclass(frozen=True, eq=False)
class Field:
    """Whole numbers, or the bits of floats, of a matrix: those of its planes, the lowest first, then flipped and added.

    flip: bits that are turned over, 0x80 for signed bytes where 128 more is meant; add: what is added then, 1 for the
    zero points of GPTQ's first layout, within the bits that the field has.
    """

    planes: tuple[Plane, ...]
    flip: int = 0
    add: int = 0

    @property
    def bits(self) -> int:
        """Of a number."""
        return sum(plane.bits for plane in self.planes)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.planes[0].rows), len(self.planes[0].columns)

    def read(self, rows: Rows = slice(None)) -> np.ndarray[Any, Any]:
        """The numbers of some rows, uint32 [rows, columns]."""
        found, shift = None, 0
        for plane in self.planes:
            more = plane.read(rows) << np.uint32(shift)
            found = more if found is None else found | more
            shift += plane.bits
        assert found is not None
        if self.flip or self.add:
            found = ((found ^ np.uint32(self.flip)) + np.uint32(self.add)) & np.uint32((1 << self.bits) - 1)
        return found

    def take_rows(self, rows: Rows) -> Field:
        """The field of some rows, in that order."""
        return replace(self, planes=tuple(replace(p, rows=p.rows[rows]) for p in self.planes))

    def take_columns(self, columns: Rows) -> Field:
        """The field of some columns, in that order."""
        return replace(self, planes=tuple(replace(p, columns=p.columns[columns]) for p in self.planes))


def bytes_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bytes of a contiguous array as uint8 [bytes], without a copy."""
    return array.reshape(-1).view(np.uint8)


def element_plane(array: np.ndarray[Any, Any], transposed: bool = False) -> Plane:
    """A contiguous 2-D array whose elements are the numbers, row by row, or column by column if ``transposed``."""
    bits = 8 * array.itemsize
    outer, inner = (np.arange(count, dtype=np.int64) * bits for count in array.shape)
    rows, columns = (inner, outer * array.shape[1]) if transposed else (outer * array.shape[1], inner)
    return Plane(bytes_of(array), bits, rows, columns)


def word_plane(
    words: np.ndarray[Any, Any],
    bits: int,
    count: int,
    *,
    along: int,
    transposed: bool = False,
    order: Sequence[int] | None = None,
) -> Plane:
    """Numbers of ``bits`` bits packed into the 32-bit words of a contiguous 2-D array.

    along: the axis of ``words`` along which a word holds several numbers; count: numbers along that axis; order: of the
    number that follows from the place in a word, place -> which of the word's numbers lies there, low bits first;
    transposed: the rows of the matrix lie along the second axis of ``words``.
    """
    each = 32 // bits
    place = np.argsort(order) if order is not None else np.arange(each)
    i = np.arange(count, dtype=np.int64)
    lines = np.arange(words.shape[1 - along], dtype=np.int64)
    width = words.shape[1]
    packed = i // each * (32 * (width if along == 0 else 1)) + place[i % each] * bits
    other = lines * (32 * (1 if along == 0 else width))
    first, second = (packed, other) if along == 0 else (other, packed)
    return Plane(bytes_of(words), bits, *((second, first) if transposed else (first, second)))
