"""The residual stream: its sum, and the rows of it that go through the head. Kernels: cuda_src/residual.cu."""

from __future__ import annotations

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import EXACT, Call, Op

__all__ = ["add", "select_rows"]


def _add(a: Array, b: Array) -> Array:
    return a + b


def _select_rows(x: Array, rows: Array) -> Array:
    return x[rows]


def _cupy_add(y: Array, a: Array, b: Array) -> None:
    import cupy

    cupy.add(a, b, out=y)


def _cupy_select_rows(y: Array, x: Array, rows: Array) -> None:
    import cupy

    cupy.take(x, rows, axis=0, out=y)


_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _add_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("residual.cu:add", (-(-call["n"] * call["d"] // (4 * _THREADS)),), (_THREADS,)),))


def _select_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("residual.cu:select_rows", (call["r"], -(-call["d"] // (4 * _THREADS))), (_THREADS,)),))


add = Op(
    "add",
    "y[n,d]:f32 = (a[n,d]:f32, b[n,d]:f32)",
    doc="y = a + b",
    reference=_add,
    kernels=_add_kernels,
    cases=[dict(n=n, d=d) for n, d in ((1, 64), (3, 7), (2, 896), (5, 4096))],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000)),
    flops=lambda c: c["n"] * c["d"],
    library=_cupy_add,
)

select_rows = Op(
    "select_rows",
    "y[r,d]:f32 = (x[n,d]:f32, rows[r]:i32)",
    doc="y = x[rows]: the tokens whose logits are asked for",
    reference=_select_rows,
    kernels=_select_kernels,
    cases=[dict(n=n, r=r, d=d) for n, r, d in ((1, 1, 64), (9, 3, 7), (6, 6, 896))],
    sizes=lambda draw: dict(n=draw(1, 9), r=draw(1, 9), d=draw(1, 3000)),
    ranges={"rows": "n"},
    tolerance=EXACT,
    library=_cupy_select_rows,
    bytes=lambda c: c["r"] * (4 + 8 * c["d"]),
)
