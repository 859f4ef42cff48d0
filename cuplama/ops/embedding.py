"""Token embedding, with and without learned position_table. Kernels: cuda_src/embedding.cu."""

from __future__ import annotations

from typing import Any

from ..dtypes import Array
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError
from .weights import segments_of, stored_bytes, weight_rows

__all__ = ["embedding", "embedding_pos"]

_CASES: list[dict[str, Any]] = [
    dict(n=1, d=8, V=5, P=4),
    dict(n=7, d=64, V=33, P=16),
    dict(n=5, d=200, V=9, P=7),
    dict(n=3, d=4096, V=4, P=3),
    dict(n=9, d=200, V=40, P=5, W="int4 g64"),
    dict(n=4, d=256, V=21, P=5, W="Q6_K"),
    dict(n=3, d=160, V=19, P=4, W="mxfp4"),
    dict(n=12, d=300, V=50, P=9, W="Q5_1 + fp8 ordered"),  # segments of 25 rows
]


def _embedding(input_ids: Array, table: Array) -> Array:
    return weight_rows(table, input_ids)


def _embedding_pos(input_ids: Array, positions: Array, table: Array, position_table: Array) -> Array:
    return weight_rows(table, input_ids) + weight_rows(position_table, positions)


def _gradient(g: Gradient) -> None:
    """Each table grows by the rows of dx at its own ids; a value "ids.order" sorts them."""
    for table, ids in (("table", "input_ids"), ("position_table", "positions")):
        if g.has(table) and g.wants(table):
            into = g.into(table)
            g.update("embedding_backward", (into,), (into, g[ids], f"{g[ids]}.order", g.of("x")))


def _sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 9), d=draw(1, 2000), V=draw(1, 40), P=draw(1, 40))


_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _kernels(call: Call, device: Device) -> Plan:
    segments = segments_of(call.arrays["table"])
    if segments is None:
        grid = (call["n"], -(-call["d"] // (8 * _THREADS)))
        return Plan((Launch(f"embedding.cu:{call.op.name}", grid, (_THREADS,)),))
    if segments_of(call.arrays.get("position_table")) is not None:
        raise OpError(f"{call.op.name}: position_table is quantised; only a table of tokens may be")
    launches, first = [], 0
    for i, segment in enumerate(segments):
        constants = {"W": segment.format.packing.type, "first": first, "rows": segment.rows}
        names = {"table": f"table.{i}", "order": f"table.{i}.order"}
        grid = (call["n"], -(-call["d"] // _THREADS))
        kernel = f"embedding.cu:{call.op.name}_packed"
        launches.append(Launch(kernel, grid, (_THREADS,), constants=constants, names=names))
        first += segment.rows
    return Plan(tuple(launches))


def _row_bytes(call: Call, table: str) -> float:
    """Of a table, in memory."""
    array = call.arrays[table]
    return stored_bytes(array) / max(1, array.shape[0]) if array is not None else 0


embedding = Op(
    "embedding",
    "x[n,d]:f32 = (input_ids[n]:i32, table[V,d]:W)",
    doc="x = table[input_ids]",
    reference=_embedding,
    gradient=_gradient,
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"input_ids": "V"},
    bytes=lambda c: c["n"] * (4 + c["d"] * 4 + _row_bytes(c, "table")),
    kernel_docs={
        "embedding": "x = table[input_ids] of a plain table",
        "embedding_packed": "x = table[input_ids] of a segment of a packed table",
    },
)

embedding_pos = Op(
    "embedding_pos",
    "x[n,d]:f32 = (input_ids[n]:i32, positions[n]:i32, table[V,d]:W, position_table[P,d]:W)",
    doc="x = table[input_ids] + position_table[positions], the learned position_table of GPT-2",
    reference=_embedding_pos,
    gradient=_gradient,
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"input_ids": "V", "positions": "P"},
    bytes=lambda c: c["n"] * (8 + c["d"] * 4 + _row_bytes(c, "table") + _row_bytes(c, "position_table")),
    kernel_docs={
        "embedding_pos": "x = table[input_ids] + position_table[positions] of a plain table",
        "embedding_pos_packed": "x = table[input_ids] + position_table[positions] of a segment of a packed table",
    },
)
