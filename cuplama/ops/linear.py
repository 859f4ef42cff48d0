"""Matrix products with a weight. Kernels: cuda_src/linear.cu (few rows); cuBLAS (many rows)."""

from __future__ import annotations

import numpy as np

from ..op import Array, Op, wide

_BLOCK = 4096  # weight rows converted at a time where the weight is kept in 16 bits


def _linear(x: Array, w: Array, b: Array | None = None, *, U: str = "") -> Array:
    x = wide(x)
    if wide(w[:0]).dtype == w.dtype:
        y = x @ w.T
    else:
        y = np.empty((len(x), len(w)), x.dtype)
        for i in range(0, len(w), _BLOCK):
            np.matmul(x, wide(w[i : i + _BLOCK]).T, out=y[:, i : i + _BLOCK])
    if b is not None:
        y += wide(b)
    return y


linear = Op(
    "linear",
    "y[n,m]:U = (x[n,k]:T, w[m,k]:T, b[m]:T?)",
    doc="y = x w^T + b",
    reference=_linear,
    cases=[
        dict(n=n, m=m, k=k, b=b, U=u)
        for n, m, k, b, u in (
            (1, 64, 64, False, "T"),
            (1, 7, 8, True, "f32"),
            (2, 33, 72, True, "T"),
            (3, 65, 1024, False, "f32"),
            (5, 130, 896, True, "T"),
            (8, 96, 2048, False, "T"),
            (9, 48, 136, True, "f32"),
            (17, 40, 64, False, "T"),
        )
    ],
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
)
