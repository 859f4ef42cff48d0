"""Matrix products with a weight. Kernels: cuda_src/linear.cu (few rows), linear_mma.cu (two to eight rows on tensor
cores); cuBLAS (many rows)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, upcast
from .launch import Device, Launch, Plan
from .op import Call, Op
from .signature import OpError

_BLOCK = 4096  # weight rows converted at a time where the weight is kept in 16 bits


def _linear(x: Array, w: Array, b: Array | None = None, *, U: str = "") -> Array:
    x = upcast(x)
    if upcast(w[:0]).dtype == w.dtype:
        y = x @ w.T
    else:
        y = np.empty((len(x), len(w)), x.dtype)
        for i in range(0, len(w), _BLOCK):
            np.matmul(x, upcast(w[i : i + _BLOCK]).T, out=y[:, i : i + _BLOCK])
    if b is not None:
        y += upcast(b)
    return y


STREAMED_ROWS = 8  # of x in one launch at most; more rows in all are cuBLAS's, where it can be had
LIBRARY = frozenset({"linear", "linear_add"})  # the ops that cuBLAS computes then
_PIECES = 4  # of 16 bytes that a lane asks for at once, as in the kernels
_STATIC = 4096 + 1024  # bytes of shared memory that the kernels and the driver take beside the dynamic ones
_STAGED = 131072  # bytes of x up to which it is copied to shared memory; beyond, it is read through L1
_LEAST_DEPTH, _MOST_DEPTH = 2, 4  # of a ring, in batches
_RING = 64 << 10  # bytes on their way at once: enough for the bandwidth, and x does not wait behind them for long
_WARPS = {160 << 10: 16, 0: 8}  # of a block at most, by the shared memory there is: its ring must be deep enough
_FULL = 0.94  # of the warps busy to the end: good enough

# linear_mma.cu
_TENSOR_ROWS = 2  # of x from which on tensor cores pay
_TILE = 16  # rows of w
_CHUNK = 64  # elements of a row of w that a warp takes at a time
_GROUP = 2  # tiles between two barriers
_REGISTERS = {False: 128, True: 64}  # chunks of x that fit into a block's; with a norm they come in f32
_LEAST_COLUMNS = 4  # of y that are worth a block


def _depth(room: int, batch: int) -> int:
    """Batches in a ring, where there is that much shared memory for it."""
    return max(_LEAST_DEPTH, min(room // batch, _RING // batch, _MOST_DEPTH))


def _most_warps(device: Device) -> int:
    return next(warps for shared, warps in _WARPS.items() if device.shared >= shared)


def _shape(rows: int, least: int, device: Device) -> tuple[int, int, int]:
    """(OUTS, blocks, warps of a block) for a weight of that many rows; OUTS is ``least`` at least.

    A block takes a whole multiprocessor, so that the blocks of the next kernel are dealt out evenly, one to each that
    comes free. Many warps drain the ring faster. More rows in a unit (OUTS) mean fewer
    accesses to x, but the warps should get equal numbers of units: if no OUTS gives that, their number is reduced.
    """
    most = _most_warps(device)
    for outs in (o for o in (4, 2, 1) if o >= least):
        units = -(-rows // outs)
        rounds = -(-units // (device.sms * most))
        if units >= _FULL * device.sms * most * rounds:
            return outs, device.sms, most
    return outs, min(units, device.sms), -(-units // (device.sms * rounds))


def _tensor_launch(
    kernel: str, call: Call, device: Device, first: int, halves: int, constants: Mapping[str, Any]
) -> Launch | None:
    """The launch of linear_mma.cu for the rows of x from ``first`` on, at most 8; None if it cannot take them.

    halves: rows of w that make a column of y. All warps of a block work on the same tiles of 16 rows of w, with equal
    slices of k; the blocks have equal numbers of columns, to one.
    """
    n, m, k, T = call["n"], call["m"], call["k"], call.dtypes["T"]
    if n - first < _TENSOR_ROWS or T.itemsize != 2 or device.arch < 80 or k % 8:
        return None
    total = -(-k // _CHUNK)
    scales = sum(name in call.arrays for name in ("g", "h"))  # vectors of a norm
    phases = -(-total // _REGISTERS[scales > 0])
    chunks = -(-total // (_most_warps(device) * phases))
    warps = -(-total // (chunks * phases))
    blocks = min(device.sms, -(-m // _LEAST_COLUMNS))
    columns = -(-m // blocks)  # of a block
    tiles = -(-columns * halves // _TILE)  # whose sums are kept from phase to phase
    sums = (2 * warps * _GROUP + (tiles if phases > 1 else 0)) * _TILE * STREAMED_ROWS * 4
    used = sums + scales * k * T.itemsize
    batch = warps * _TILE * _CHUNK * 2
    room = device.shared - _STATIC - used
    if room < _LEAST_DEPTH * batch:
        return None
    depth = _depth(room, batch)
    shared = max(depth * batch + used, device.shared // 2)
    own = {"WARPS": warps, "CHUNKS": chunks, "PHASES": phases, "DEPTH": depth, "first": first}
    return Launch(f"linear_mma.cu:{kernel}_mma", (blocks,), (32 * warps,), shared, constants={**constants, **own})


def stream_rows(kernel: str, call: Call, device: Device, *, normed: bool = False, **constants: Any) -> Plan:
    """Launches of a kernel of linear.cu, or its twin in linear_mma.cu: groups of up to 8 rows of x, fewer where shared
    memory cannot hold them.

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
        if (tensor := _tensor_launch(kernel, call, device, first, halves, constants)) is not None:
            launches.append(tensor)
            first += STREAMED_ROWS
            continue
        rows = min(STREAMED_ROWS, n - first)
        if normed:
            rows = min(rows, (limit - _LEAST_DEPTH * batch) // row)
            if rows < 1:
                raise OpError(f"{call.op.name}: k is {k}; {device.shared} bytes of shared memory do not hold a row")
        staged = normed or rows * row <= min(_STAGED, limit - 3 * batch)
        x = -(-rows * row // 16) * 16 * staged
        depth = _depth(limit - x, batch)
        own = {"ROWS": rows, "OUTS": outs, "DEPTH": depth, "first": first}
        if not normed:
            own["STAGED"] = staged
        shared = max(depth * batch + x, device.shared // 2)  # two blocks do not fit
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
