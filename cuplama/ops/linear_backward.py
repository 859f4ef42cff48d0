"""Gradients of the product y = x w^T + b: dx = dy w, dw = dy^T x, db = the sums of dy's columns.

Kernels: cuda_src/linear_backward.cu, and cuBLAS, which computes the products wherever it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .linear import PRODUCT_TOLERANCE
from .op import Op
from .team import LEAST_WORK, fill, multiplying
from .weights import weight_rows

__all__ = ["linear_backward_b", "linear_backward_w", "linear_backward_x"]

_ROWS = 256  # of a result that a thread computes at a time

_CASES: list[Mapping[str, Any]] = [
    dict(n=n, m=m, k=k, a=a)
    for n, m, k, a in ((1, 8, 8, False), (3, 33, 17, True), (20, 64, 96, False), (70, 130, 65, True))
]


def _by_pieces(out: Array, work: int, piece: Callable[[slice], Array]) -> None:
    """Fill the rows of ``out``, some at a time, by the threads of the pass. work: multiply-adds of all of it."""
    if work < LEAST_WORK:
        with multiplying:
            out[...] = piece(slice(len(out)))
        return
    cuts = [slice(i, i + _ROWS) for i in range(0, len(out), _ROWS)]
    fill([out[rows] for rows in cuts], [partial(piece, rows) for rows in cuts], work)


def _linear_backward_x(dy: Array, w: Array, a: Array | None = None) -> Array:
    dy, w = upcast(dy), weight_rows(w, slice(len(w)))
    dx = np.empty((len(dy), w.shape[1]), dy.dtype)
    _by_pieces(dx, dy.size * w.shape[1], lambda rows: dy[rows] @ w)
    return dx if a is None else dx + upcast(a)


def _linear_backward_w(dw: Array, dy: Array, x: Array) -> Array:
    dy, x = upcast(dy), upcast(x)
    _by_pieces(dw, dy.size * x.shape[1], lambda rows: dw[rows] + dy[:, rows].T @ x)
    return dw


def _linear_backward_b(db: Array, dy: Array) -> Array:
    db += upcast(dy).sum(0)
    return db


linear_backward_x = Op(
    "linear_backward_x",
    "dx[n,k]:T = (dy[n,m]:T, w[m,k]:W, a[n,k]:T?)",
    doc="dx = dy w + a, the gradient of linear for its input",
    reference=_linear_backward_x,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 70), m=draw(1, 90), k=draw(1, 90), a=bool(draw(0, 1))),
    tolerance=PRODUCT_TOLERANCE,
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
)

linear_backward_w = Op(
    "linear_backward_w",
    "dw[m,k]:f32 = (dw[m,k]:f32, dy[n,m]:T, x[n,k]:T)",
    doc="dw += dy^T x, the gradient of linear for its weight",
    reference=_linear_backward_w,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 70), m=draw(1, 90), k=draw(1, 90), a=bool(draw(0, 1))),
    tolerance=PRODUCT_TOLERANCE,
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
)

linear_backward_b = Op(
    "linear_backward_b",
    "db[m]:f32 = (db[m]:f32, dy[n,m]:T)",
    doc="db += the sums of dy's columns, the gradient of linear for its bias",
    reference=_linear_backward_b,
    cases=[dict(n=n, m=m) for n, m in ((1, 8), (3, 33), (300, 70), (70, 896))],
    sizes=lambda draw: dict(n=draw(1, 300), m=draw(1, 300)),
    tolerance=PRODUCT_TOLERANCE,
    flops=lambda c: c["n"] * c["m"],
)
