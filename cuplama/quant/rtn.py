"""Round to nearest: a matrix of plain numbers to codes and scales, some rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .fields import Field, element_plane, word_plane
from .format import Format
from .grid import Floats, Grid, grid_format, inverse

__all__ = ["Quantised", "Rounded", "dividing_group", "round_to_nearest"]

_PIECE = 1 << 18  # elements that are worked on at a time: 1 MB of float32, which a core's cache holds
_GROUPS = (128, 64, 32)  # of columns that share a scale, where the grid's own number divides no row


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix [m, k] on a grid.

    codes: uint8 [m, k]; scales: float32 [m, groups], numbers of ``dtype``, which they are stored in; group: columns that
    share one, 0 for whole rows; order: int32 [k] or None, as in ``Stored``: column j here is column order[j] of the
    weight.
    """

    grid: Grid
    group: int
    dtype: np.dtype[Any]
    codes: np.ndarray[Any, np.dtype[np.uint8]]
    scales: Floats
    order: np.ndarray[Any, Any] | None = None

    @property
    def format(self) -> Format:
        """As kernels know it."""
        return grid_format(self.grid, self.group, self.dtype)

    def numbers(self) -> Floats:
        """What it holds, float32 [m, k]."""
        m, k = self.codes.shape
        found = self.grid.code.numbers[self.codes].reshape(m, self.scales.shape[1], -1) * self.scales[..., None]
        found = found.reshape(m, k)
        if self.order is None:
            return found
        ordered = np.empty_like(found)
        ordered[:, self.order] = found
        return ordered

    def fields(self) -> dict[str, Field]:
        """Where its numbers lie in memory, as a ``Stored`` has them."""
        scales = self.scales.astype(self.dtype) if self.group else self.scales
        bits = self.grid.code.bits
        plane = (
            element_plane(self.codes)
            if bits == 8
            else word_plane(packed_words(self.codes, bits), bits, self.codes.shape[1], along=1)
        )
        return {"code": Field((plane,)), "scale": Field((element_plane(scales),))}

    def __getitem__(self, rows: slice) -> Quantised:
        """Some rows."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])


def packed_words(codes: np.ndarray[Any, np.dtype[np.uint8]], bits: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Codes [m, k] in 32-bit words, low bits first along a row: int32 [m, ceil(k / (32 / bits))]."""
    m, k = codes.shape
    each = 32 // bits
    padded = np.zeros((m, -(-k // each) * each), np.uint8)
    padded[:, :k] = codes
    if bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << 4
    words: np.ndarray[Any, np.dtype[np.int32]] = np.ascontiguousarray(padded).view("<i4")
    return words


def dividing_group(grid: Grid, k: int) -> int | None:
    """The grid's own group, or if that does not divide a row of k the largest smaller one that does; None for none."""
    fits = (g for g in (grid.group, *_GROUPS) if g <= grid.group and (g == 0 or k % g == 0))
    return next(fits, None)


def round_to_nearest(w: Array, grid: Grid, group: int, dtype: np.dtype[Any]) -> Quantised:
    """Each number of w [m, k] to the nearest on the grid. group: divides k, 0 for whole rows; dtype: of the scales."""
    m, k = w.shape
    codes, scales = np.empty((m, k), np.uint8), np.empty((m, k // (group or k)), np.float32)
    rows = max(1, _PIECE // k)
    for at in range(0, m, rows):
        some = slice(at, at + rows)
        piece = np.ascontiguousarray(upcast(w[some]), np.float32).reshape(-1, scales.shape[1], group or k)
        scales[some] = grid.scales(piece, dtype)
        codes[some] = grid.codes(piece * inverse(scales[some])[..., None]).reshape(-1, k)
    return Quantised(grid, group, dtype, codes, scales)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A plain matrix [m, k] that is quantised when it is read: array-like, and to its readers as a ``Stored``.

    plain: its numbers, a view of a mapped file; nbytes: as it will be stored. Rows are taken first, so that no more than
    a chunk is in memory.
    """

    plain: Array
    grid: Grid
    group: int

    order: None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.plain.shape[0], self.plain.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the scales: the checkpoint's."""
        found: np.dtype[Any] = self.plain.dtype
        return found

    @property
    def format(self) -> Format:
        """As kernels know it."""
        return grid_format(self.grid, self.group, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        m, k = self.shape
        scales = m * (k // self.group) * self.dtype.itemsize if self.group else 4 * m
        return m * k * self.grid.code.bits // 8 + scales

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Array | slice) -> Rounded:
        return replace(self, plain=self.plain[rows])

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        """As of ``Stored``: the matrix is quantised now."""
        return round_to_nearest(self.plain, self.grid, self.group, self.dtype).fields()

    def numbers(self) -> Floats:
        """What it holds once it is quantised, float32 [m, k]."""
        return round_to_nearest(self.plain, self.grid, self.group, self.dtype).numbers()
