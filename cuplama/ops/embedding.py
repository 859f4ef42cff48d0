"""Token embedding, with and without learned positions. Kernels: cuda_src/embedding.cu."""

from __future__ import annotations

from ..kernel import Device, Launch, Plan
from ..op import Array, Call, Op, wide

_CASES = [
    dict(n=1, d=8, V=5, P=4),
    dict(n=7, d=64, V=33, P=16),
    dict(n=5, d=200, V=9, P=7),
    dict(n=3, d=4096, V=4, P=3),
]


def _embedding(ids: Array, table: Array) -> Array:
    return wide(table[ids])


def _embedding_pos(ids: Array, pos: Array, table: Array, positions: Array) -> Array:
    return wide(table[ids]) + wide(positions[pos])


_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _kernels(call: Call, device: Device) -> Plan:
    grid = (call["n"], -(-call["d"] // (8 * _THREADS)))
    return Plan((Launch(f"embedding.cu:{call.op.name}", grid, (_THREADS,)),))


embedding = Op(
    "embedding",
    "x[n,d]:f32 = (ids[n]:i32, table[V,d]:T)",
    doc="x = table[ids]",
    reference=_embedding,
    kernels=_kernels,
    cases=_CASES,
    ranges={"ids": "V"},
    bytes=lambda c: c["n"] * (4 + c["d"] * (4 + c.dtypes["T"].itemsize)),
)

embedding_pos = Op(
    "embedding_pos",
    "x[n,d]:f32 = (ids[n]:i32, pos[n]:i32, table[V,d]:T, positions[P,d]:T)",
    doc="x = table[ids] + positions[pos], the learned positions of GPT-2",
    reference=_embedding_pos,
    kernels=_kernels,
    cases=_CASES,
    ranges={"ids": "V", "pos": "P"},
    bytes=lambda c: c["n"] * (8 + c["d"] * (4 + 2 * c.dtypes["T"].itemsize)),
)
