"""A temperature of attention that grows with the position, as Llama 4 and Ministral 3 have it.

Kernels: cuda_src/scale_queries.cu. Nakanishi, "Scalable-Softmax Is Superior for Attention", arXiv:2501.19399, has the
logarithm; here it begins to grow behind the context that the model was first trained with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op

__all__ = ["scale_queries"]

_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _scale_queries(
    x: Array, positions: Array, *, num_heads: int, num_kv_heads: int, temperature: float, context: int
) -> Array:
    y = np.array(upcast(x))
    queries = y.shape[1] // (num_heads + 2 * num_kv_heads) * num_heads
    factor = 1 + temperature * np.log1p((positions // context).astype(y.dtype))
    y[:, :queries] *= factor[:, None]
    return y


def _gradient(g: Gradient) -> None:
    """Each element is multiplied by a number that does not depend on x, and so is its gradient."""
    attrs = {name: g.attr(name) for name in ("num_heads", "num_kv_heads", "temperature", "context")}
    g.give("x", g.emit("scale_queries", g.of("y"), g["positions"], **attrs))


def _kernels(call: Call, device: Device) -> Plan:
    columns = (call["num_heads"] + 2 * call["num_kv_heads"]) * call["D"]
    width = 16 // call.dtypes["T"].itemsize
    grid = (call["n"], -(-columns // (width * _THREADS)))
    return Plan((Launch("scale_queries.cu:scale_queries", grid, (_THREADS,)),))


def _sizes(draw: Draw) -> dict[str, Any]:
    heads = dict(num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=draw(1, 140))
    return dict(n=draw(1, 9), **heads, temperature=0.125 * draw(1, 9), context=draw(1, 50))


scale_queries = Op(
    "scale_queries",
    "y[n,(num_heads+2*num_kv_heads)*D]:T = (x[n,(num_heads+2*num_kv_heads)*D]:T, positions[n]:i32, num_heads:i32,"
    " num_kv_heads:i32, temperature:f32, context:i32)",
    doc="Multiplies query heads at position p by 1 + temperature log(1 + floor(p / context)); copies other heads.",
    reference=_scale_queries,
    gradient=_gradient,
    recompute="layers",
    kernels=_kernels,
    cases=[
        dict(n=n, num_heads=q, num_kv_heads=k, D=d, temperature=t, context=c)
        for n, q, k, d, t, c in (
            (1, 4, 2, 64, 0.5, 1),
            (3, 1, 1, 7, 0.1, 3),
            (5, 3, 1, 80, 0.25, 16),
            (2, 32, 8, 128, 0.1, 16384),
        )
    ],
    sizes=_sizes,
    ranges={"positions": "5*context"},
    rules=("context > 0",),
    shape=dict(n=1, num_heads=32, num_kv_heads=8, D=128, temperature=0.1, context=16384),
    flops=lambda c: c["n"] * c["num_heads"] * c["D"],
)
