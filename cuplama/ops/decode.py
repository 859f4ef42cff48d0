"""Between two decode steps: the drawn tokens become the next inputs, without the host. Kernels: cuda_src/decode.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import Device, Launch, Plan
from ..op import Array, Call, Op

_THREADS = 64


def _advance(
    ids: Array,
    pos: Array,
    slots: Array,
    lengths: Array,
    rows: Array,
    ring: Array,
    step: Array,
    token: Array,
    blocks: Array,
    *,
    S: int,
) -> tuple[Array, ...]:
    ids[:] = np.maximum(token, 0)
    for counter in (pos, lengths, rows):
        counter += 1
    page = np.minimum(pos // S, blocks.shape[1] - 1)
    slots[:] = blocks[np.arange(len(pos)), page] * S + pos % S
    ring[step[0] % len(ring)] = token
    step += 1
    return ids, pos, slots, lengths, rows, ring, step


def _inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    pos = rng.integers(0, case["S"] * case["M"] + 2, case["b"]).astype(np.int32)  # past the table's end as well
    token = rng.integers(-1, 1000, case["b"]).astype(np.int32)
    token[1:2] = -1
    return {"pos": pos, "lengths": pos + 1, "rows": pos + 7, "step": np.array([case["at"]], np.int32), "token": token}


def _kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("decode.cu:advance", (1,), (_THREADS,)),))


advance = Op(
    "advance",
    "ids[b]:i32, pos[b]:i32, slots[b]:i32, lengths[b]:i32, rows[b]:i32, ring[R,b]:i32, step[1]:i32 ="
    " (ids[b]:i32, pos[b]:i32, slots[b]:i32, lengths[b]:i32, rows[b]:i32, ring[R,b]:i32, step[1]:i32, token[b]:i32,"
    " blocks[b,M]:i32, S:i32)",
    doc="The inputs of the next decode step: ids = token (0 for -1, which is none); pos, lengths and rows grow by one;"
    " slots follows pos through the block table (its last entry stands for all beyond). ring[step % R] = token, then"
    " step grows by one: the ring lies in host memory, where the engine reads it behind the GPU.",
    reference=_advance,
    kernels=_kernels,
    cases=[
        dict(b=b, M=m, S=s, R=r, at=at) for b, m, s, r, at in ((1, 3, 64, 4, 0), (5, 2, 16, 3, 7), (200, 1, 8, 2, 1))
    ],
    ranges={"ids": "9+0*b", "slots": "9+0*b", "ring": "9+0*b", "blocks": "50+0*b"},
    inputs=_inputs,
)
