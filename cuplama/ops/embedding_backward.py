"""The gradient of an embedding. Kernels: cuda_src/embedding_backward.cu.

A token that occurs more than once gets the sum over its occurrences, in their order: ``order`` sorts the tokens, so
that those of one id stand together and no two threads add to the same row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op

__all__ = ["embedding_backward"]

_PIECE, _THREADS, _COLUMNS = (
    32,
    64,
    4,
)  # positions of a piece; threads of a block, columns of a thread: as in the kernels


def _embedding_backward(dtable: Array, ids: Array, order: Array, dx: Array) -> Array:
    rows = ids[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    if len(starts):
        dtable[rows[starts]] += np.add.reduceat(upcast(dx)[order], starts, axis=0)
    return dtable


def _kernels(call: Call, device: Device) -> Plan:
    n, d = call["n"], call["d"]
    pieces = -(-n // _PIECE)
    grid = (pieces, -(-d // (_THREADS * _COLUMNS)))
    kernels = ("embedding_backward", "embedding_backward_runs")[: 1 if pieces == 1 else 2]
    launches = tuple(Launch(f"embedding_backward.cu:{kernel}", grid, (_THREADS,)) for kernel in kernels)
    return Plan(launches, {"partial": ((pieces, 2, d), "f32")})


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Ids of which some are common, as words are: the logarithm of the id's rank is uniform."""
    ids = (case["V"] ** rng.random(case["n"])).astype(np.int32) - 1
    if case.get("one"):  # token, of which there is a run as long as the text, less the last
        ids[:-1] = ids[0]
    return {"ids": ids, "order": np.argsort(ids, kind="stable").astype(np.int32)}


def _sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 400), V=draw(1, 60), d=draw(1, 300))


def _bytes(call: Call) -> float:
    """Each token that occurs has its row read and written; there may be as many as positions."""
    n, V, d = (int(call[name]) for name in "nVd")
    return n * (8 + 4 * d) + 8 * min(n, V) * d


embedding_backward = Op(
    "embedding_backward",
    "dtable[V,d]:f32 = (dtable[V,d]:f32, ids[n]:i32, order[n]:i32, dx[n,d]:f32)",
    doc="dtable[ids[i]] += dx[i] for every i. order: the stable argsort of ids.",
    reference=_embedding_backward,
    kernels=_kernels,
    kernel_docs={
        "embedding_backward": "The sums of the runs of equal ids, as far as they lie in one piece of 32 positions.",
        "embedding_backward_runs": "Adds up what the pieces gave of a run that lies in several.",
    },
    cases=[
        dict(n=1, V=5, d=8),
        dict(n=32, V=3, d=64),
        dict(n=33, V=1, d=12),  # one run that crosses the border by a position
        dict(n=100, V=7, d=7),
        dict(n=64, V=2000, d=260),
        dict(n=700, V=40, d=36),
        dict(n=1300, V=4, d=4, one=True),  # more pieces of a run than a warp looks at at once
    ],
    sizes=_sizes,
    inputs=_inputs,
    ranges={"ids": "V", "order": "n"},
    shape=dict(n=16384, V=50257, d=768),
    # Units of float32's rounding: the sum of a run of L numbers of either sign, added one after the other, is off by
    # about sqrt(L / 6), which is 15 for the longest run of the cases.
    tolerance={"f32": 16.0},
    bytes=_bytes,
    flops=lambda c: c["n"] * c["d"],
)
