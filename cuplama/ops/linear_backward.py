"""Gradients of the product y = x w^T + b: dx = dy w, dw = dy^T x, db = the sums of dy's columns.

Kernels: cuda_src/linear_backward.cu, and cuBLAS, which computes the products wherever it is there, for any number of
rows. A packed weight, which is frozen, is unpacked before (cuda_src/unpack.cu).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name, upcast
from .launch import Device, Launch, Plan
from .linear import PRODUCT_TOLERANCE
from .matmul import Matmul
from .op import Call, Op
from .team import LEAST_WORK, fill, multiplying
from .unpacking import UNPACKED, unpack_launches
from .weights import segments_of, weight_rows

__all__ = ["linear_backward_b", "linear_backward_w", "linear_backward_x"]

_ROWS = 256  # of a result that a thread computes at a time

_TILE, _TILE_THREADS = 64, 256  # rows and columns of a product that a block computes
_SUM_COLUMNS, _SUM_ROWS = 256, 32  # of a block of column_sums; its rows are a multiple
_SUM_BLOCKS = 4  # of column_sums for each multiprocessor: enough to read at full speed
_ADD_THREADS = 128

_CASES: list[Mapping[str, Any]] = [
    dict(n=n, m=m, k=k, a=a)
    for n, m, k, a in ((1, 8, 8, False), (3, 33, 17, True), (20, 64, 96, False), (70, 130, 65, True))
]
_W_CASES: list[Mapping[str, Any]] = [{size: case[size] for size in "nmk"} for case in _CASES]
_PACKED_CASES: list[Mapping[str, Any]] = [
    dict(n=n, m=m, k=k, a=a, W=W)
    for n, m, k, a, W in (
        (5, 40, 328, True, "int4 g128"),
        (70, 48, 256, False, "Q4_K + Q6_K"),
        (3, 33, 136, True, "fp8 ordered"),
    )
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


def _product(kernel: str, rows: int, columns: int, **names: str) -> Launch:
    tiles = -(-rows // _TILE), -(-columns // _TILE)
    return Launch(f"linear_backward.cu:{kernel}", tiles, (_TILE_THREADS,), names=names)


def _x_kernels(call: Call, device: Device) -> Plan:
    n, m, k, w = call["n"], call["m"], call["k"], call.arrays["w"]
    segments = None if w is None else segments_of(w)
    if segments is None:
        return Plan((_product("linear_backward_x", n, k),))
    launches = *unpack_launches(segments, k, 0, m), _product("linear_backward_x", n, k, w=UNPACKED)
    return Plan(launches, {UNPACKED: ((m, k), dtype_name(call.dtypes["T"]))})


def _w_kernels(call: Call, device: Device) -> Plan:
    return Plan((_product("linear_backward_w", call["m"], call["k"]),))


def _b_kernels(call: Call, device: Device) -> Plan:
    """The rows are cut into pieces, so that all multiprocessors read; their sums are added up in order."""
    n, m = call["n"], call["m"]
    columns = -(-m // _SUM_COLUMNS)
    pieces = max(1, min(-(-n // _SUM_ROWS), _SUM_BLOCKS * device.sms // columns))
    rows = -(-n // (pieces * _SUM_ROWS)) * _SUM_ROWS
    pieces = -(-n // rows)
    sums = Launch("linear_backward.cu:column_sums", (columns, pieces), (_SUM_COLUMNS,), constants={"rows": rows})
    blocks = (-(-m // _ADD_THREADS),)
    add = Launch("linear_backward.cu:linear_backward_b", blocks, (_ADD_THREADS,), constants={"pieces": pieces})
    return Plan((sums, add), {"partial": ((pieces, m), "f32")})


linear_backward_x = Op(
    "linear_backward_x",
    "dx[n,k]:T = (dy[n,m]:T, w[m,k]:W, a[n,k]:T?)",
    doc="dx = dy w + a, the gradient of linear for its input",
    reference=_linear_backward_x,
    kernels=_x_kernels,
    cases=[*_CASES, *_PACKED_CASES],
    sizes=lambda draw: dict(n=draw(1, 140), m=draw(1, 140), k=draw(1, 140), a=bool(draw(0, 1))),
    tolerance=PRODUCT_TOLERANCE,
    shape={"n": 4096, "m": 2048, "k": 2048},
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
    matmul=Matmul("nn", {"x": "dy", "w": "w", "y": "dx", "c": "a"}, ("n", "k", "m"), streamed=False),
    kernel_docs={
        "linear_backward_x": "dx = dy w + a, where there is no cuBLAS",
        "unpack": "dense = the numbers of a packed weight, which the product then takes",
    },
)

linear_backward_w = Op(
    "linear_backward_w",
    "dw[m,k]:f32 = (dw[m,k]:f32, dy[n,m]:T, x[n,k]:T)",
    doc="dw += dy^T x, the gradient of linear for its weight",
    reference=_linear_backward_w,
    kernels=_w_kernels,
    cases=_W_CASES,
    sizes=lambda draw: dict(n=draw(1, 140), m=draw(1, 140), k=draw(1, 140)),
    tolerance=PRODUCT_TOLERANCE,
    shape={"n": 4096, "m": 2048, "k": 2048},
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
    matmul=Matmul("tn", {"x": "dy", "w": "x", "y": "dw", "c": "dw"}, ("m", "k", "n"), streamed=False),
)

linear_backward_b = Op(
    "linear_backward_b",
    "db[m]:f32 = (db[m]:f32, dy[n,m]:T)",
    doc="db += the sums of dy's columns, the gradient of linear for its bias",
    reference=_linear_backward_b,
    kernels=_b_kernels,
    cases=[dict(n=n, m=m) for n, m in ((1, 8), (3, 33), (300, 70), (70, 896), (33, 256))],
    sizes=lambda draw: dict(n=draw(1, 300), m=draw(1, 300)),
    tolerance=PRODUCT_TOLERANCE,
    shape={"n": 4096, "m": 2048},
    flops=lambda c: c["n"] * c["m"],
    kernel_docs={
        "column_sums": "partial[p,j] = sum of dy[i,j] over the rows i of piece p",
        "linear_backward_b": "db[j] += sum of partial[p,j] over all pieces p",
    },
)
