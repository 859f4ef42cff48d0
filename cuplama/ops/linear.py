"""Matrix products with a weight. Kernels: cuda_src/linear.cu (few rows), linear_mma.cu (two to eight rows on tensor
cores), those of packed weights (linear_packed.py, linear_packed_many.py); cuBLAS (many rows)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .linear_packed import MAX_FEW_ROWS, halves_of, plan_packed
from .linear_packed_many import many_rows_docs, many_rows_plan
from .matmul import Matmul
from .op import Call, Draw, Op
from .signature import OpError
from .team import LEAST_WORK, fill, multiplying
from .weights import segments_of, weight_rows

__all__ = [
    "MAX_STREAMED_ROWS",
    "PRODUCT_TOLERANCE",
    "Prologue",
    "TensorShape",
    "linear",
    "one_phase",
    "product_sizes",
    "stream_rows",
    "tensor_shape",
]

_SMALL = 400_000  # multiplications of a product that OpenBLAS computes without copying its inputs first (AVX-512)
_PIECE = 1 << 22  # work of a piece that a thread computes at a time, about 0.1 ms, and 4 MB of a weight; see ``fill``
_MIN_PIECE_ROWS = 128  # of a weight: fewer would make a large product slower


def _linear(x: Array, w: Array, b: Array | None = None, *, U: str = "") -> Array:
    x = upcast(x)
    row = x.shape[1] * (len(x) + 3)  # work for a row of w: multiply-adds, and 3 for each element that is read
    if len(w) * row < LEAST_WORK:
        with multiplying:
            y = _piece(x, w, slice(len(w)))
    else:
        y = np.empty((len(x), len(w)), x.dtype)
        count = max(_MIN_PIECE_ROWS, _PIECE // row)
        cuts = [slice(i, i + count) for i in range(0, len(w), count)]
        fill([y[:, rows] for rows in cuts], [partial(_piece, x, w, rows) for rows in cuts], len(w) * row)
    if b is not None:
        y += upcast(b)
    return y


def _piece(x: Array, w: Array, rows: slice) -> Array:
    """x w^T for some rows of w; for few rows of x in products so small that they are computed without copies, which
    takes a third of the time."""
    w = weight_rows(w, rows)
    count = _SMALL // max(1, x.size) // 16 * 16
    if len(x) == 1 or not 0 < count < len(w):
        return x @ w.T
    y = np.empty((len(x), len(w)), x.dtype)
    for i in range(0, len(w), count):
        np.matmul(x, w[i : i + count].T, out=y[:, i : i + count])
    return y


MAX_STREAMED_ROWS = 8
"""Rows of x that one launch takes. Where there are more rows in all, cuBLAS computes the product, if it is there."""

PRODUCT_TOLERANCE: Mapping[str, float] = {"f32": 100.0, "f16:f32": 320.0, "bf16:f32": 320.0}
"""A float32 sum of k products is off by about sqrt(k / 6) roundings if they are added one after the other: by 49, or
3e-6 of the norm, where k is 14,336, the longest of an 8B model; twice that is allowed. Tensor cores, which multiply
16-bit numbers, cut off partial sums where float32 rounds them (Fasi et al., "Numerical behavior of NVIDIA tensor
cores", PeerJ Computer Science 7, 2021), and take a normalised x as the sum of two 16-bit numbers: 320 units are 2e-5 of
the norm. A result that is stored in 16 bits is rounded once, behind the sum."""

# linear.cu. A block copies its rows of w to shared memory through a ring of batches, ahead of what it multiplies.
_LANE_LOADS = 4  # 16-byte loads that a lane issues for one batch; BATCH in linear.cu
_WARP_BATCH = 32 * _LANE_LOADS * 16  # bytes
_RESERVED_BYTES = 4096 + 1024  # of shared memory: the kernels' static arrays, and what the driver keeps for itself
_MAX_STAGED_BYTES = 128 << 10  # of rows of x that are copied to shared memory; larger ones are read through L1
_MIN_DEPTH, _MAX_DEPTH = 2, 4  # batches in a ring: one is multiplied while the others arrive
_MAX_RING_BYTES = 64 << 10  # This much on its way saturates the memory; with 200 KiB x waited 4 microseconds behind it.
# The most warps of a block: 16 where a block can have 160 KiB of shared memory or more, else 8. The ring holds a batch
# for each warp, so with less memory 16 warps would leave it fewer than _MIN_DEPTH batches.
_MAX_WARPS = {160 << 10: 16, 0: 8}
_MIN_BUSY = 0.94  # A division of the rows is taken if at least this share of all warps works until the end.

# linear_mma.cu, on tensor cores. A tile is 16 rows of w; the warps of a block divide k, in chunks of 64 elements.
_MIN_TENSOR_ROWS = 2  # rows of x: for a single row linear.cu is faster (measured on an H200)
_TILE_ROWS = 16  # the M of the instruction mma.m16n8k16
_CHUNK = 64  # elements of a row of w, 128 bytes, that a warp multiplies at a time
_GROUP_TILES = 2  # tiles whose sums the warps add up behind one barrier
# Chunks of x that the registers of a block hold, and so the longest part of k that goes through the tiles at once: half
# as much if a norm comes first, because then x arrives as float32.
_MAX_CHUNKS = {"plain": 128, "normed": 64}
_MIN_COLUMNS = 4  # of y for a block: for fewer its start costs more than it saves


def _depth(room: int, batch: int) -> int:
    """Batches in a ring, where there is that much shared memory for it."""
    return max(_MIN_DEPTH, min(room // batch, _MAX_RING_BYTES // batch, _MAX_DEPTH))


def _max_warps(device: Device) -> int:
    return next(warps for shared, warps in _MAX_WARPS.items() if device.shared >= shared)


def _shape(rows: int, min_outs: int, device: Device) -> tuple[int, int, int]:
    """(OUTS, blocks, warps of a block) for a weight of that many rows; OUTS is ``min_outs`` at least.

    A block takes a whole multiprocessor, so that the blocks of the next kernel are dealt out evenly, one to each that
    comes free. Many warps drain the ring faster. More rows in a unit (OUTS) mean fewer accesses to x, but the warps
    should get equal numbers of units: if no OUTS gives that, the number of warps is reduced.
    """
    max_warps = _max_warps(device)
    for outs in (o for o in (4, 2, 1) if o >= min_outs):
        units = -(-rows // outs)
        rounds = -(-units // (device.sms * max_warps))
        if units >= _MIN_BUSY * device.sms * max_warps * rounds:
            return outs, device.sms, max_warps
    return outs, min(units, device.sms), -(-units // (device.sms * rounds))


@dataclass(frozen=True)
class TensorShape:
    """How the warps of a block divide k in the kernels of linear_mma.cuh: in each of ``phases`` a warp has ``chunks``
    chunks, of which ``depth`` are in its ring. shared: bytes of shared memory that a block takes."""

    warps: int
    chunks: int
    phases: int
    depth: int
    shared: int

    @property
    def constants(self) -> dict[str, int]:
        """Template arguments."""
        return {"WARPS": self.warps, "CHUNKS": self.chunks, "PHASES": self.phases, "DEPTH": self.depth}


def one_phase(k: int) -> bool:
    """Whether rows of k elements behind a norm fit into the registers of a block on tensor cores."""
    return -(-k // _CHUNK) <= _MAX_CHUNKS["normed"]


def tensor_shape(
    k: int, tiles: int, device: Device, longest: int = _MAX_CHUNKS["plain"], beside: int = 0
) -> TensorShape | None:
    """The division of rows of k elements, or None where shared memory is too small for it.

    tiles: whose sums are kept from phase to phase, if there are several; longest: chunks of a phase; beside: bytes of
    shared memory for something else.
    """
    total = -(-k // _CHUNK)
    phases = -(-total // longest)
    chunks = -(-total // (_max_warps(device) * phases))
    warps = -(-total // (chunks * phases))
    sums = (2 * warps * _GROUP_TILES + (tiles if phases > 1 else 0)) * _TILE_ROWS * MAX_STREAMED_ROWS * 4
    batch = warps * _TILE_ROWS * _CHUNK * 2
    room = device.shared - _RESERVED_BYTES - sums - beside
    if room < _MIN_DEPTH * batch:
        return None
    depth = _depth(room, batch)
    return TensorShape(warps, chunks, phases, depth, max(depth * batch + sums + beside, device.shared // 2))


def _tensor_launch(
    kernel: str, call: Call, device: Device, first: int, halves: int, constants: Mapping[str, Any]
) -> Launch | None:
    """The launch of linear_mma.cu for the rows of x from ``first`` on, at most 8; None if it cannot take them.

    halves: rows of w that make a column of y. All warps of a block work on the same tiles of 16 rows of w, with equal
    slices of k; the blocks have equal numbers of columns, to one.
    """
    n, m, k, T = call["n"], call["m"], call["k"], call.dtypes["T"]
    if n - first < _MIN_TENSOR_ROWS or T.itemsize != 2 or device.arch < 80 or k % 8 or device.deterministic:
        return None  # of one row linear.cu adds up the products in another order
    scales = sum(name in call.arrays for name in ("g", "h", "post"))  # vectors of norms
    blocks = min(device.sms, -(-m // _MIN_COLUMNS))
    columns = -(-m // blocks)  # of a block
    longest = _MAX_CHUNKS["normed" if scales else "plain"]
    shape = tensor_shape(k, -(-columns * halves // _TILE_ROWS), device, longest, scales * k * T.itemsize)
    if shape is None:
        return None
    own = {**shape.constants, "first": first}
    block = (32 * shape.warps,)
    return Launch(f"linear_mma.cu:{kernel}_mma", (blocks,), block, shape.shared, constants={**constants, **own})


@dataclass(frozen=True)
class Prologue:
    """What a kernel with a norm has in shared memory, in bytes: for each row of x, and once."""

    row: int
    once: int = 0

    def rows(self, call: Call, device: Device, halves: int) -> int:
        """How many rows of x a block of linear.cu has room for, beside the shortest ring. halves: of w, rows that make
        a column of y."""
        batch = _shape(call["m"] * halves, halves, device)[2] * _WARP_BATCH
        return max(0, device.shared - _RESERVED_BYTES - self.once - _MIN_DEPTH * batch) // self.row


def stream_rows(kernel: str, call: Call, device: Device, *, prologue: Prologue | None = None, **constants: Any) -> Plan:
    """Launches of a kernel of linear.cu, or its twin in linear_mma.cu: groups of up to 8 rows of x, fewer where shared
    memory cannot hold them.

    prologue: of a kernel that begins with a norm; constants: the kernel's own; ``ACT`` tells how many rows of w make a
    column of y. More groups read the weight again: correct, but cuBLAS is the fast way for many rows.
    """
    w = call.arrays["w"]
    if w is not None and (segments := segments_of(w)) is not None:
        many = (call["n"] > MAX_FEW_ROWS or device.deterministic) and kernel in ("linear", "linear_add")
        plan = many_rows_plan(kernel, call, device) if many else None
        return plan or plan_packed(kernel, call, device, segments, constants)
    n, m, k, size = call["n"], call["m"], call["k"], call.dtypes["T"].itemsize
    halves = halves_of(constants)
    outs, blocks, warps = _shape(m * halves, halves, device)
    batch = warps * _WARP_BATCH  # bytes that a block asks for at once
    limit = device.shared - _RESERVED_BYTES
    has = prologue or Prologue(k * size)
    launches = []
    first = 0
    while first < n:
        if (tensor := _tensor_launch(kernel, call, device, first, halves, constants)) is not None:
            launches.append(tensor)
            first += MAX_STREAMED_ROWS
            continue
        rows = min(MAX_STREAMED_ROWS, n - first)
        if prologue:
            rows = min(rows, prologue.rows(call, device, halves))
            if rows < 1:
                raise OpError(f"{call.op.name}: k is {k}; {device.shared} bytes of shared memory do not hold a row")
        staged = prologue is not None or rows * has.row <= min(_MAX_STAGED_BYTES, limit - 3 * batch)
        x = -(-(rows * has.row + has.once) // 16) * 16 * staged
        depth = _depth(limit - x, batch)
        own = {"ROWS": rows, "OUTS": outs, "DEPTH": depth, "first": first}
        if not prologue:
            own["STAGED"] = staged
        shared = max(depth * batch + x, device.shared // 2)  # two blocks do not fit
        launches.append(Launch(f"linear.cu:{kernel}", (blocks,), (32 * warps,), shared, constants={**constants, **own}))
        first += rows
    return Plan(tuple(launches))


def _kernels(call: Call, device: Device) -> Plan:
    return stream_rows("linear", call, device)


def _gradient(g: Gradient) -> None:
    dy = g.rounded("y")
    if g.wants("w"):
        g.update("linear_backward_w", (g.into("w"),), (g.into("w"), dy, g["x"]))
    if g.has("b") and g.wants("b"):
        g.update("linear_backward_b", (g.into("b"),), (g.into("b"), dy))
    if g.wants("x"):
        g.give("x", g.emit("linear_backward_x", dy, g["w"], g.so_far("x")))


def product_sizes(draw: Draw) -> dict[str, Any]:
    """A random product of up to 12 rows, with or without a bias, into either dtype."""
    n, m, k = draw(1, 12), draw(1, 70), draw(1, 40) * draw(1, 40)
    return dict(n=n, m=m, k=k, b=bool(draw(0, 1)), U=("T", "f32")[draw(0, 1)], eps=1e-6)


linear = Op(
    "linear",
    "y[n,m]:U = (x[n,k]:T, w[m,k]:W, b[m]:T?)",
    doc="y = x w^T + b",
    reference=_linear,
    gradient=_gradient,
    recompute="layers",
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
    ]
    + [
        dict(n=n, m=m, k=k, b=b, U=u, W=W)
        for n, m, k, b, u, W in (
            (1, 40, 328, True, "T", "int4 g128"),
            (3, 70, 256, False, "f32", "Q4_K + Q6_K"),
            (2, 33, 200, False, "T", "nf4"),
            (1, 24, 200, True, "f32", "mxfp4"),
            (16, 48, 256, True, "f32", "int4 g128"),
            (40, 48, 256, False, "T", "Q4_K"),
            (20, 33, 136, True, "T", "fp8 ordered"),
        )
    ],
    sizes=product_sizes,
    tolerance=PRODUCT_TOLERANCE,
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
    matmul=Matmul(),
    kernel_docs={
        "linear": "y = x w^T + b for up to 8 rows of x, by multiply-adds",
        "linear_mma": "y = x w^T + b for two to eight rows of x, on tensor cores",
        "linear_packed": "y = act(x w^T + b) for up to 8 rows of x and a packed weight",
        **many_rows_docs("linear", "y = x w^T + b"),
        "gather_columns": "gathered[i,j] = x[i,order[j]], for a packed weight whose columns were sorted",
    },
)
