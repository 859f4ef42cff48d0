"""Rotary position embedding. Kernels: cuda_src/rope.cu. Su et al., "RoFormer", arXiv:2104.09864.

The variants (linear, dynamic, llama3, yarn, longrope) differ only in what the tables hold: cuplama/models/rope.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op

__all__ = ["random_rotations", "rope", "rope_backward", "rope_pairs", "rope_pairs_backward"]


_Dims = Callable[[int], tuple[slice, slice]]
"""The dims of a head that are rotated together, first and second ones, by the number of rotations."""


def _halves(h: int) -> tuple[slice, slice]:
    return slice(h), slice(h, 2 * h)


def _pairs(h: int) -> tuple[slice, slice]:
    return slice(0, 2 * h, 2), slice(1, 2 * h, 2)


def _rotate(
    dims: _Dims, x: Array, rope_rows: Array, cos: Array, sin: Array, *, num_heads: int, num_kv_heads: int, D: int
) -> Array:
    first, second = dims(cos.shape[1])
    y = np.array(upcast(x)).reshape(len(x), num_heads + 2 * num_kv_heads, D)
    turned = y[:, : num_heads + num_kv_heads]
    a, b = turned[..., first].copy(), turned[..., second].copy()
    c, s = cos[rope_rows][:, None], sin[rope_rows][:, None]
    turned[..., first] = a * c - b * s
    turned[..., second] = b * c + a * s
    return y.reshape(len(x), -1)


def _rotate_back(dims: _Dims, dy: Array, rope_rows: Array, cos: Array, sin: Array, **shape: int) -> Array:
    return _rotate(dims, dy, rope_rows, cos, -sin, **shape)


def _gradient(g: Gradient) -> None:
    attrs = {name: g.attr(name) for name in ("num_heads", "num_kv_heads", "D")}
    g.give("x", g.emit(f"{g.op}_backward", g.of("y"), g["rope_rows"], g["cos"], g["sin"], **attrs))


def _sizes(draw: Draw) -> dict[str, Any]:
    h = draw(1, 70)
    D = 2 * h + draw(0, 1) * draw(1, 40)
    return dict(n=draw(1, 9), num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=D, h=h, R=draw(1, 50))


def random_rotations(rng: np.random.Generator, case: Mapping[str, Any]) -> dict[str, Any]:
    """Tables cos[R,h] and sin[R,h] of random angles: rotations, which lengthen nothing."""
    angle = rng.uniform(0, 2 * np.pi, (case["R"], case["h"]))
    return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    return random_rotations(rng, case)


_THREADS = 128


def _kernels(call: Call, device: Device) -> Plan:
    columns = (call["num_heads"] + 2 * call["num_kv_heads"]) * call["D"]
    return Plan((Launch(f"rope.cu:{call.op.name}", (call["n"], -(-columns // (8 * _THREADS))), (_THREADS,)),))


def _flops(call: Call) -> float:
    return float(6 * call["n"] * (call["num_heads"] + call["num_kv_heads"]) * call["h"])


_CASES = [
    dict(n=n, num_heads=q, num_kv_heads=k, D=d, h=h, R=r)
    for n, q, k, d, h, r in (
        (1, 4, 2, 64, 32, 5),
        (3, 1, 1, 8, 4, 9),
        (4, 3, 1, 80, 40, 33),
        (5, 4, 4, 96, 36, 7),
        (2, 32, 8, 128, 64, 64),
    )
]
_SHAPE = dict(n=1, num_heads=32, num_kv_heads=2, D=128, h=32, R=4096)  # to time pairs with: that of GLM-4-9B

rope = Op(
    "rope",
    "y[n,(num_heads+2*num_kv_heads)*D]:T = (x[n,(num_heads+2*num_kv_heads)*D]:T, rope_rows[n]:i32, cos[R,h]:f32,"
    " sin[R,h]:f32, num_heads:i32, num_kv_heads:i32, D:i32)",
    doc="Rotates dims i and i + h (i < h) of every query and key head by the angle in row rope_rows[n]; h <= D/2.",
    reference=partial(_rotate, _halves),
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"rope_rows": "R"},
    inputs=_inputs,
    gradient=_gradient,
    recompute="layers",
    rules=("2 * h <= D",),
    flops=_flops,
)

rope_backward = Op(
    "rope_backward",
    "dx[n,(num_heads+2*num_kv_heads)*D]:T = (dy[n,(num_heads+2*num_kv_heads)*D]:T, rope_rows[n]:i32, cos[R,h]:f32,"
    " sin[R,h]:f32, num_heads:i32, num_kv_heads:i32, D:i32)",
    doc="The gradient of rope: rotates by the negative angle.",
    reference=partial(_rotate_back, _halves),
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"rope_rows": "R"},
    inputs=_inputs,
    rules=("2 * h <= D",),
    flops=_flops,
)

rope_pairs = Op(
    "rope_pairs",
    "y[n,(num_heads+2*num_kv_heads)*D]:T = (x[n,(num_heads+2*num_kv_heads)*D]:T, rope_rows[n]:i32, cos[R,h]:f32,"
    " sin[R,h]:f32, num_heads:i32, num_kv_heads:i32, D:i32)",
    doc="Rotates dims 2i and 2i + 1 (i < h) of every query and key head by the angle in row rope_rows[n]; h <= D/2.",
    reference=partial(_rotate, _pairs),
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"rope_rows": "R"},
    inputs=_inputs,
    gradient=_gradient,
    recompute="layers",
    rules=("2 * h <= D",),
    shape=_SHAPE,
    flops=_flops,
)

rope_pairs_backward = Op(
    "rope_pairs_backward",
    "dx[n,(num_heads+2*num_kv_heads)*D]:T = (dy[n,(num_heads+2*num_kv_heads)*D]:T, rope_rows[n]:i32, cos[R,h]:f32,"
    " sin[R,h]:f32, num_heads:i32, num_kv_heads:i32, D:i32)",
    doc="The gradient of rope_pairs: rotates by the negative angle.",
    reference=partial(_rotate_back, _pairs),
    kernels=_kernels,
    cases=_CASES,
    sizes=_sizes,
    ranges={"rope_rows": "R"},
    inputs=_inputs,
    rules=("2 * h <= D",),
    shape=_SHAPE,
    flops=_flops,
)
