"""Matrix products with a weight. Kernels: cuda_src/linear.cu (few rows); cuBLAS (many rows)."""

from __future__ import annotations

import numpy as np

from ..kernel import Device, Launch, Plan
from ..op import Array, Call, Op, wide

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


_ROWS = 8  # the most rows of x in one launch
_WARPS = 4  # per block, as in the kernel
# Rows of x -> OUTS, DEPTH. A lane keeps OUTS * DEPTH = 8 loads of 16 bytes in flight, so that 16 warps keep 64 KB in
# flight on a multiprocessor: ample for an H200 (4.65 TB/s over 132 of them, at a latency near 1 us: 35 KB). More rows
# want more OUTS, because each piece of x is read from L1 and converted once per OUTS weights.
_SHAPE = {1: (2, 4), 2: (2, 4), 3: (2, 4), 4: (2, 4), 5: (4, 2), 6: (4, 2), 7: (4, 2), 8: (4, 2)}
_BUSY = 16  # warps per multiprocessor; with fewer, several warps share a row of w


def _kernels(call: Call, device: Device) -> Plan:
    """Groups of up to 8 rows. More groups read the weight again: correct, but cuBLAS is the fast way there."""
    n, m = call["n"], call["m"]
    launches = []
    for first in range(0, n, _ROWS):
        rows = min(_ROWS, n - first)
        outs, depth = _SHAPE[rows]
        groups = -(-m // outs)
        split = next((s for s in (1, 2) if groups * s >= _BUSY * device.sms), _WARPS)
        constants = {"ROWS": rows, "OUTS": outs, "DEPTH": depth, "SPLIT": split, "first": first}
        blocks = -(-groups * split // _WARPS)
        launches.append(Launch("linear.cu:linear_rows", (blocks,), (32 * _WARPS,), constants=constants))
    return Plan(tuple(launches))


linear = Op(
    "linear",
    "y[n,m]:U = (x[n,k]:T, w[m,k]:T, b[m]:T?)",
    doc="y = x w^T + b",
    reference=_linear,
    kernels=_kernels,
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
