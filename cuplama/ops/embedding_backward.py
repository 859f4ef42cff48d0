"""The gradient of an embedding. Kernel: cuda_src/embedding_backward.cu.

A token that occurs more than once gets the sum over its occurrences, in their order: ``order`` sorts the tokens, so
that those of one id stand together and no two threads add to the same row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .op import Op

__all__ = ["embedding_backward"]


def _embedding_backward(dtable: Array, ids: Array, order: Array, dx: Array) -> Array:
    rows = ids[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    if len(starts):
        dtable[rows[starts]] += np.add.reduceat(upcast(dx)[order], starts, axis=0)
    return dtable


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    ids = rng.integers(0, case["V"], case["n"]).astype(np.int32)
    return {"ids": ids, "order": np.argsort(ids, kind="stable").astype(np.int32)}


embedding_backward = Op(
    "embedding_backward",
    "dtable[V,d]:f32 = (dtable[V,d]:f32, ids[n]:i32, order[n]:i32, dx[n,d]:f32)",
    doc="dtable[ids[i]] += dx[i] for every i. order: the stable argsort of ids.",
    reference=_embedding_backward,
    cases=[dict(n=n, d=d, V=V) for n, d, V in ((1, 8, 5), (7, 64, 33), (50, 100, 3), (90, 33, 40))],
    sizes=lambda draw: dict(n=draw(1, 90), d=draw(1, 300), V=draw(1, 40)),
    inputs=_inputs,
    ranges={"ids": "V", "order": "n"},
)
