"""Token embedding, with and without learned position_table. Kernels: cuda_src/embedding.cu."""

from __future__ import annotations

from typing import Any

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import EXACT, Call, Draw, Op
from .weights import weight_rows

__all__ = ["embedding", "embedding_pos"]

_CASES = [
    dict(n=1, d=8, V=5, P=4),
    dict(n=7, d=64, V=33, P=16),
    dict(n=5, d=200, V=9, P=7),
    dict(n=3, d=4096, V=4, P=3),
]


def _embedding(input_ids: Array, table: Array) -> Array:
    return weight_rows(table, input_ids)


def _embedding_pos(input_ids: Array, positions: Array, table: Array, position_table: Array) -> Array:
    return weight_rows(table, input_ids) + weight_rows(position_table, positions)


def _sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 9), d=draw(1, 2000), V=draw(1, 40), P=draw(1, 40))


_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _kernels(call: Call, device: Device) -> Plan:
    grid = (call["n"], -(-call["d"] // (8 * _THREADS)))
    return Plan((Launch(f"embedding.cu:{call.op.name}", grid, (_THREADS,)),))


embedding = Op(
    "embedding",
    "x[n,d]:f32 = (input_ids[n]:i32, table[V,d]:W)",
    doc="x = table[input_ids]",
    reference=_embedding,
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"input_ids": "V"},
    tolerance=EXACT,
    bytes=lambda c: c["n"] * (4 + c["d"] * (4 + c.dtypes["T"].itemsize)),
)

embedding_pos = Op(
    "embedding_pos",
    "x[n,d]:f32 = (input_ids[n]:i32, positions[n]:i32, table[V,d]:W, position_table[P,d]:W)",
    doc="x = table[input_ids] + position_table[positions], the learned position_table of GPT-2",
    reference=_embedding_pos,
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"input_ids": "V", "positions": "P"},
    bytes=lambda c: c["n"] * (8 + c["d"] * (4 + 2 * c.dtypes["T"].itemsize)),
)
