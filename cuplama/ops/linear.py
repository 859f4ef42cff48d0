"""Matrix products with a weight. Kernels: cuda_src/linear.cu (few rows); cuBLAS (many rows)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import Device, Launch, Plan
from ..op import DTYPES, Array, Call, Op, OpError, wide

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


STREAMED_ROWS = 8  # of x in one launch at most; more rows in all are cuBLAS's, where it can be had
LIBRARY = frozenset({"linear", "linear_add"})  # the ops that cuBLAS computes then
_PIECES = 4  # of 16 bytes that a lane asks for at once, as in the kernels
_STATIC = 4096 + 1024  # bytes of shared memory that the kernels and the driver take beside the dynamic ones
_STAGED = 131072  # bytes of x up to which it is copied to shared memory; beyond, it is read through L1
_LEAST_DEPTH, _MOST_DEPTH = 2, 12  # of the ring, in batches
_WARPS = {160 << 10: 16, 0: 8}  # of a block at most, by the shared memory there is: its ring must be deep enough
_FULL = 0.94  # of the warps busy to the end: good enough


def _shape(rows: int, least: int, device: Device) -> tuple[int, int, int]:
    """(OUTS, blocks, warps of a block) for a weight of that many rows; OUTS is ``least`` at least.

    A block takes a whole multiprocessor, so that the blocks of the next kernel are dealt out evenly, one to each that
    comes free. Many warps drain the ring faster that was filled before the wait. More rows in a unit (OUTS) mean fewer
    accesses to x, but the warps should get equal numbers of units: if no OUTS gives that, their number is reduced.
    """
    most = next(warps for shared, warps in _WARPS.items() if device.shared >= shared)
    for outs in (o for o in (4, 2, 1) if o >= least):
        units = -(-rows // outs)
        rounds = -(-units // (device.sms * most))
        if units >= _FULL * device.sms * most * rounds:
            return outs, device.sms, most
    return outs, min(units, device.sms), -(-units // (device.sms * rounds))


def stream_rows(kernel: str, call: Call, device: Device, *, normed: bool = False, **constants: Any) -> Plan:
    """Launches of a kernel of linear.cu: groups of up to 8 rows of x, fewer where shared memory cannot hold them.

    constants: the kernel's own; ``ACT`` tells how many rows of w make a column of y. More groups read the weight again:
    correct, but cuBLAS is the fast way for many rows.
    """
    n, m, k, size = call["n"], call["m"], call["k"], call.dtypes["T"].itemsize
    halves = 2 if constants.get("ACT") == "SILU_MUL" else 1
    outs, blocks, warps = _shape(m * halves, halves, device)
    batch = warps * 32 * _PIECES * 16  # bytes that a block asks for at once
    limit = device.shared - _STATIC
    row = k * (DTYPES[constants["U"]].itemsize if normed else size)  # bytes of a row of x in shared memory
    launches = []
    first = 0
    while first < n:
        rows = min(STREAMED_ROWS, n - first)
        if normed:
            rows = min(rows, (limit - _LEAST_DEPTH * batch) // row)
            if rows < 1:
                raise OpError(f"{call.op.name}: k is {k}; {device.shared} bytes of shared memory do not hold a row")
        staged = normed or rows * row <= min(_STAGED, limit - 3 * batch)
        x = -(-rows * row // 16) * 16 * staged
        depth = max(_LEAST_DEPTH, min((limit - x) // batch, _MOST_DEPTH))
        own = {"ROWS": rows, "OUTS": outs, "DEPTH": depth, "first": first}
        if not normed:
            own["STAGED"] = staged
        shared = depth * batch + x
        launches.append(Launch(f"linear.cu:{kernel}", (blocks,), (32 * warps,), shared, constants={**constants, **own}))
        first += rows
    return Plan(tuple(launches))


def _kernels(call: Call, device: Device) -> Plan:
    return stream_rows("linear", call, device)


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
