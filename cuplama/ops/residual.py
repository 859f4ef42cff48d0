"""The residual stream: its sum, and the rows of it that go through the head. Kernels: cuda_src/residual.cu."""

from __future__ import annotations

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import Call, Op


def _add(a: Array, b: Array) -> Array:
    return a + b


def _select_rows(x: Array, rows: Array) -> Array:
    return x[rows]


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
    flops=lambda c: c["n"] * c["d"],
)

select_rows = Op(
    "select_rows",
    "y[r,d]:f32 = (x[n,d]:f32, rows[r]:i32)",
    doc="y = x[rows]: the tokens whose logits are asked for",
    reference=_select_rows,
    kernels=_select_kernels,
    cases=[dict(n=n, r=r, d=d) for n, r, d in ((1, 1, 64), (9, 3, 7), (6, 6, 896))],
    ranges={"rows": "n"},
    bytes=lambda c: c["r"] * (4 + 8 * c["d"]),
)
