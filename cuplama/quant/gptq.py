"""GPTQ: a matrix is quantised column by column, and what each column loses is made up for by those after it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323.
The loss is that of the product x w^T with the calibration's inputs, and H = x^T x its second derivative for every row of
w. With the inverse of H = u^T u, u upper triangular, a column's error e is made up for by taking e / u[j, j] * u[j, c]
from each later column c. Columns are halved again and again, so that nearly all of the work is products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .grid import Floats, Grid, inverse
from .rtn import Quantised

__all__ = ["DAMPING", "SORTS", "Matrix", "gptq", "inverse_factor"]

Matrix = np.ndarray[Any, np.dtype[np.float64]]
DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal: H has an inverse then
SORTS = ("none", "columns", "groups")
_UNCUT = 128  # columns of a triangle that is inverted as a whole


def gptq(
    w: Floats, hessian: Matrix, grid: Grid, group: int, dtype: np.dtype[Any], sort: str = "columns"
) -> Quantised:
    """Quantise w [m, k], float32.

    hessian: [k, k], x^T x of the inputs x [n, k], or a multiple of it; group: divides k, 0 for whole rows; dtype: of the
    scales. sort: the order in which columns are quantised, since the last ones have the most to make up for. "none":
    theirs; "columns": those with the largest inputs first, but a group is of neighbours, and its scale is chosen before
    anything is made up for; "groups": groups are made in that order, too, so that the result has an ``order``.
    """
    k, size = w.shape[1], group or w.shape[1]
    hessian = hessian.copy()
    diagonal = hessian.diagonal()
    unused = diagonal <= 0  # inputs that are always 0: whatever their weights are changes nothing
    hessian[unused, unused] = diagonal[~unused].mean() if not unused.all() else 1
    order = np.arange(k) if sort == "none" else np.argsort(-hessian.diagonal(), kind="stable")
    columns = np.ascontiguousarray(w.T)  # [k, m]: a column is read at once
    columns[unused] = 0
    importance = hessian.diagonal().astype(np.float32)
    scales = np.empty((k // size, w.shape[0]), np.float32)
    if sort == "columns":
        scales[:] = _scales(columns, importance, grid, size, dtype)
    factor = inverse_factor(hessian[np.ix_(order, order)]).astype(np.float32)
    run = _Run(columns[order], importance[order], factor, scales, grid, size, dtype, order if sort == "columns" else None)
    run.quantise(0, k)
    codes = run.codes
    if sort == "columns":
        codes[order] = run.codes.copy()
    in_groups = order.astype(np.int32) if sort == "groups" else None
    return Quantised(grid, group, dtype, np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), in_groups)


def _scales(columns: Floats, importance: Floats, grid: Grid, size: int, dtype: np.dtype[Any]) -> Floats:
    """The scales of columns [c, m] in groups of ``size``: [c / size, m]."""
    groups = columns.T.reshape(columns.shape[1], -1, size)
    return grid.scales(groups, dtype, importance.reshape(-1, size) / importance.max()).T


@dataclass
class _Run:
    """Columns [k, m] in the order in which they are quantised, and of each, once it is, its error over u[j, j].

    scales: [groups, m], filled in as a group begins, unless ``fixed`` says which column of the matrix each is.
    """

    columns: Floats
    importance: Floats
    factor: Floats
    scales: Floats
    grid: Grid
    size: int
    dtype: np.dtype[Any]
    fixed: np.ndarray[Any, Any] | None

    def __post_init__(self) -> None:
        self.codes = np.empty(self.columns.shape, np.uint8)

    def quantise(self, first: int, end: int) -> None:
        """The columns from ``first`` to ``end``, which have made up for all before them."""
        count = end - first
        if count == 1:
            return self._column(first)
        groups = count // self.size  # a group is cut only where it stands alone: its scale is of columns up to date
        middle = first + (groups // 2 * self.size if groups > 1 else count // 2)
        self.quantise(first, middle)
        self.columns[middle:end] -= self.factor[first:middle, middle:end].T @ self.columns[first:middle]
        self.quantise(middle, end)

    def _column(self, j: int) -> None:
        if self.fixed is None and j % self.size == 0:
            group = slice(j, j + self.size)
            of_group = _scales(self.columns[group], self.importance[group], self.grid, self.size, self.dtype)
            self.scales[j // self.size] = of_group[0]
        scale = self.scales[(j if self.fixed is None else self.fixed[j]) // self.size]
        codes = self.grid.codes(self.columns[j] * inverse(scale))
        self.codes[j] = codes
        self.columns[j] -= self.grid.code.numbers[codes] * scale
        self.columns[j] /= self.factor[j, j]


def inverse_factor(hessian: Matrix) -> Matrix:
    """u, upper triangular, with u^T u the inverse of H and its damping. Raises LinAlgError for an H with no inverse.

    H = r r^T with r upper triangular is the Cholesky decomposition from the last column to the first; u is r's inverse.
    """
    damped = hessian.copy()
    damped[np.diag_indices_from(damped)] += DAMPING * hessian.diagonal().mean()
    return _inverse(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1])


def _inverse(r: Matrix) -> Matrix:
    """Of an upper triangular matrix."""
    k = len(r)
    if k <= _UNCUT:
        return np.triu(np.linalg.inv(r))
    half = k // 2
    found = np.zeros_like(r)
    found[:half, :half] = _inverse(r[:half, :half])
    found[half:, half:] = _inverse(r[half:, half:])
    found[:half, half:] = -(found[:half, :half] @ r[:half, half:]) @ found[half:, half:]
    return found
