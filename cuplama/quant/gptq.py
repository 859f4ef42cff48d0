"""GPTQ: a matrix is quantised column by column, and what each column loses is made up for by those after it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323.
The loss is that of the product with the calibration's inputs, x w^T; its second derivative is H = 2 x^T x for every row
of w. With Hinv = u^T u, u upper triangular, an error e in column j is made up for by taking e / u[j, j] * u[j, c] from
each later column c. Columns are halved again and again, so that nearly all of the work is products of matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .grid import Floats, Grid, inverse
from .rtn import Quantised

__all__ = ["DAMPING", "Matrix", "gptq", "inverse_factor"]

Matrix = np.ndarray[Any, np.dtype[np.float64]]
DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal: columns that hardly differ have an inverse then
_TRIANGLE = 128  # columns of a triangle that is inverted without being cut


def gptq(w: Floats, hessian: Matrix, grid: Grid, group: int, dtype: np.dtype[Any], *, sort: str = "rows") -> Quantised:
    """Quantise w [m, k], float32.

    hessian: [k, k], x^T x of the inputs x [n, k], or a multiple; group: divides k, 0 for whole rows; dtype: of the
    scales. sort: "none": columns in their own order; "rows": those with the largest inputs first, while a group's
    columns stay neighbours, whose scale is then of the weights before anything was made up for; "groups": groups are
    made in that order, too, and the result has an ``order``.
    """
    m, k = w.shape
    size = group or k
    diagonal = hessian.diagonal().copy()
    unused = diagonal == 0  # inputs that are always 0: their weights may be anything
    order = np.arange(k) if sort == "none" else np.argsort(-diagonal, kind="stable")
    place = np.argsort(order) if sort == "rows" else np.arange(k)  # of column c of w, or of the sorted w
    columns = np.ascontiguousarray(w.T)  # [k, m]: a column of w is read at once
    columns[unused] = 0
    importance = diagonal.astype(np.float32)
    if sort == "rows":
        scales = grid.scales(w_groups(columns, size), dtype, importance.reshape(-1, size))
    return _Columns(...)
