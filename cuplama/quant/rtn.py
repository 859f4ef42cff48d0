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
from .stored import Stored

__all__ = ["GROUPS", "Quantised", "Rounded", "dividing_group", "packed_words", "round_to_nearest", "unpacked_words"]

_PIECE = 1 << 18  # elements that are worked on at a time: 1 MB of float32, which a core's cache holds
GROUPS = (128, 64, 32)
"""Columns that share a scale, from the most to the fewest that are tried where nobody asks for a number."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix [m, k] on a grid.

    codes: uint8 [m, k]; scales: float32 [m, groups], numbers of ``dtype``, which they are stored in; group: columns
    that share one, 0 for whole rows.
    """

    grid: Grid
    group: int
    dtype: np.dtype[Any]
    codes: np.ndarray[Any, np.dtype[np.uint8]]
    scales: Floats

    @property
    def format(self) -> Format:
        """As kernels know it."""
        return grid_format(self.grid, self.group, self.dtype)

    def numbers(self) -> Floats:
        """What it holds, float32 [m, k]."""
        m = len(self.codes)
        found: Floats = self.grid.code.numbers[self.codes]
        groups = found.reshape(m, self.scales.shape[1], -1)
        groups *= self.scales[..., None]
        return found

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


def unpacked_words(words: np.ndarray[Any, Any], bits: int, k: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Codes [m, k] of 4 or 8 bits from their words: the inverse of ``packed_words``."""
    found = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        found = np.stack([found & 15, found >> 4], -1).reshape(len(found), -1)
    return found[:, :k]


def dividing_group(grid: Grid, k: int) -> int | None:
    """The grid's own group, or if that does not divide a row of k the largest smaller one that does; None for none."""
    fits = (g for g in (grid.group, *GROUPS) if g <= grid.group and (g == 0 or k % g == 0))
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


class Rounded(Stored):
    """A plain matrix [m, k] that is quantised when its fields are read, and to its readers a ``Stored``.

    plain: its numbers, a view of a mapped file, whose dtype the scales get; grid, group: as of ``Quantised``. Rows are
    taken from the plain matrix, so that no more than what is read is quantised.
    """

    plain: Array
    grid: Grid
    group: int

    def __init__(self, plain: Array, grid: Grid, group: int) -> None:
        m, k = plain.shape
        scales = m * (k // group) * plain.dtype.itemsize if group else 4 * m
        nbytes = m * k * grid.code.bits // 8 + scales
        values = {"shape": (m, k), "format": grid_format(grid, group, plain.dtype), "nbytes": nbytes, "order": None}
        vars(self).update(values, plain=plain, grid=grid, group=group)

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        """As of ``Stored``: the matrix is quantised now."""
        return self._quantised().fields()

    def __getitem__(self, rows: Array | slice) -> Rounded:
        return Rounded(self.plain[rows], self.grid, self.group)

    def numbers(self) -> Floats:
        """What it holds once it is quantised, float32 [m, k]."""
        return self._quantised().numbers()

    def settled(self) -> Stored:
        """The matrix quantised, in memory."""
        return Stored(self.shape, self.format, self.fields, self.nbytes)

    def _quantised(self) -> Quantised:
        return round_to_nearest(self.plain, self.grid, self.group, self.plain.dtype)
