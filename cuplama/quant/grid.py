"""The numbers that a quantised weight may have, before its scale: which is nearest, and which scale suits a group.

A scale maps the largest number of a group, with its sign, to the far end of the grid: the whole numbers of 4 bits are
-8 .. 7, so a group whose largest number is positive has a negative scale, and no number is cut off. Of some smaller
scales, under which the largest number is cut off and the others lie closer, that with the least squared error is taken.
On the bundled model, int4 in groups of 64, the error's norm is 9.1% of the weights' norm; with the scale alone that
maps the largest to 7.5, as it is usual, 10.3%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..dtypes import dtype_name
from .format import E4M3, Code, Format, grouped, whole

__all__ = ["GRIDS", "Grid", "grid_format"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Grid:
    """The numbers of a code.

    code: its bits; least, most: the ends of the range; far: the end that the largest number of a group is mapped to;
    signed: whether it goes there with its sign; shares: of that scale, those that are tried; group: columns that share
    a scale unless another number is asked for, 0 for whole rows.
    """

    name: str
    code: Code
    least: float
    most: float
    far: float
    signed: bool
    shares: tuple[float, ...]
    group: int

    def nearest(self, ratios: Floats) -> Floats:
        """The numbers of the grid nearest to weights over their scales, float32; halves go to even. Works in place."""
        np.clip(ratios, self.least, self.most, out=ratios)
        if self.code is E4M3:
            return ratios.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return np.rint(ratios, out=ratios)

    def codes(self, ratios: Floats) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The codes, uint8, of the numbers nearest to weights over their scales. Works in place."""
        np.clip(ratios, self.least, self.most, out=ratios)
        if self.code is E4M3:
            return ratios.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        np.rint(ratios, out=ratios)
        ratios -= np.float32(self.least)
        return ratios.astype(np.uint8)

    def scales(self, w: Floats, dtype: np.dtype[Any], importance: Floats | None = None) -> Floats:
        """The scale of each group of w [m, groups, columns]: float32 [m, groups], rounded to ``dtype``.

        importance: what the squared errors of the columns weigh, [groups, columns]. A group of zeros, or of numbers
        whose scale ``dtype`` rounds to 0, has the scale 1.
        """
        at = np.abs(w).argmax(-1)[..., None]
        largest = np.take_along_axis(w, at, -1)[..., 0]
        whole_range = (largest if self.signed else np.abs(largest)) / np.float32(self.far)
        best = least = None
        for share in self.shares:
            scale = (whole_range * np.float32(share)).astype(dtype).astype(np.float32)
            scale[scale == 0] = 1
            if len(self.shares) == 1:
                return scale
            errors = self.nearest(w * inverse(scale)[..., None]) * scale[..., None] - w
            errors *= errors
            if importance is not None:
                errors *= importance
            total = _sum(errors)
            if best is None or least is None:
                best, least = scale, total
            else:
                better = total < least
                best, least = np.where(better, scale, best), np.where(better, total, least)
        assert best is not None
        return best


def inverse(scale: Floats) -> Floats:
    """1 / scale in float32: ratios are products with it, here and in kernels."""
    return np.float32(1) / scale


def _sum(values: Floats) -> Floats:
    """Sums over the last axis: of halves, of their halves, and so on, in the order in which a kernel's threads add."""
    while (count := values.shape[-1]) > 1:
        half = (count + 1) // 2
        first = values[..., :half].copy()
        first[..., : count - half] += values[..., half:]
        values = first
    return values[..., 0]


GRIDS: Mapping[str, Grid] = {
    "int4": Grid("int4", whole(4, 8), -8, 7, -8, True, (1, 0.95, 0.9, 0.83), 128),
    "int8": Grid("int8", whole(8, 128), -128, 127, -128, True, (1,), 0),
    "fp8": Grid("fp8", E4M3, -448, 448, 448, False, (1,), 0),
}
"""What weights can be quantised to, by name."""


def grid_format(grid: Grid, group: int, dtype: np.dtype[Any]) -> Format:
    """The format of weights on that grid. group: 0 for whole rows; dtype: of the scales where there are groups."""
    name, scales = (f"{grid.name} g{group}", dtype_name(dtype)) if group else (grid.name, "f32")
    return grouped(name, grid.code, group, scales)
