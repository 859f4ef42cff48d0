"""Between two decode steps: the drawn tokens become the next inputs, without the host. Kernels: cuda_src/advance.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import Call, Op

__all__ = ["advance"]

_THREADS = 64


def _advance(
    input_ids: Array,
    positions: Array,
    slot_mapping: Array,
    seq_lens: Array,
    rope_rows: Array,
    ring: Array,
    step: Array,
    token: Array,
    page_table: Array,
    *,
    S: int,
) -> tuple[Array, ...]:
    used = np.flatnonzero(seq_lens)
    input_ids[used] = np.maximum(token[used], 0)
    for counter in (positions, seq_lens, rope_rows):
        counter[used] += 1
    at = positions[used]
    page = np.minimum(at // S, page_table.shape[1] - 1)
    slot_mapping[used] = page_table[used, page] * S + at % S
    ring[step[0] % len(ring)] = token
    step += 1
    return input_ids, positions, slot_mapping, seq_lens, rope_rows, ring, step


def _inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    positions = rng.integers(0, case["S"] * case["M"] + 2, case["b"]).astype(np.int32)  # past the table's end as well
    token = rng.integers(-1, 1000, case["b"]).astype(np.int32)
    token[1:2] = -1
    return {
        "positions": positions,
        "seq_lens": np.where(np.arange(case["b"]) % 4 == 3, 0, positions + 1).astype(np.int32),  # some are empty
        "rope_rows": positions + 7,
        "step": np.array([case["at"]], np.int32),
        "token": token,
    }


def _kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("advance.cu:advance", (1,), (_THREADS,)),))


advance = Op(
    "advance",
    "input_ids[b]:i32, positions[b]:i32, slot_mapping[b]:i32, seq_lens[b]:i32, rope_rows[b]:i32, ring[R,b]:i32,"
    " step[1]:i32 = (input_ids[b]:i32, positions[b]:i32, slot_mapping[b]:i32, seq_lens[b]:i32, rope_rows[b]:i32,"
    " ring[R,b]:i32, step[1]:i32, token[b]:i32, page_table[b,M]:i32, S:i32)",
    doc="The inputs of the next decode step: input_ids = token (0 for -1, which is none); positions, seq_lens and"
    " rope_rows grow by one; slot_mapping follows positions through the page table (its last entry stands for all"
    " beyond). A row whose seq_len is 0 belongs to no sequence and stays as it is."
    " ring[step % R] = token, then step grows by one: the ring lies in host memory, where the engine reads it"
    " behind the GPU.",
    reference=_advance,
    kernels=_kernels,
    cases=[
        dict(b=b, M=m, S=s, R=r, at=at) for b, m, s, r, at in ((1, 3, 64, 4, 0), (5, 2, 16, 3, 7), (200, 1, 8, 2, 1))
    ],
    ranges={"input_ids": "9+0*b", "slot_mapping": "9+0*b", "ring": "9+0*b", "page_table": "50+0*b"},
    sizes=lambda draw: dict(b=draw(1, 70), M=draw(1, 5), S=8 * draw(1, 8), R=draw(1, 4), at=draw(0, 9)),
    inputs=_inputs,
)
