"""A norm, a router, its choice and the pairs by expert in one launch, for few rows. Kernel: cuda_src/norm_route.cu.

Defined by its parts, ``rms_norm``, ``linear``, ``route`` and ``sort_pairs``: the reference only calls theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .launch import Device, Launch, Plan
from .linear import MAX_STREAMED_ROWS, linear
from .norm import rms_norm
from .op import Call, Draw, Op
from .route import lane_experts, route, sort_pairs
from .signature import OpError

__all__ = ["rms_norm_route"]

_WARP = 32
_WARPS = 8  # of a block, an expert for each; as in norm_route.cu
_RESERVED_BYTES = 4096  # of shared memory: static arrays, and what the driver keeps for itself
# Of inputs for tests: the deviation of logits, and the least distance of those that are chosen. The norm's rounding to
# bf16 changes logits by 0.0011 on the average.
_SPREAD, _GAP = 1.0, 0.008
_APART = 100.0  # logits of experts with a bias are beyond those without, as their scores are


def _reference(
    x: Array,
    g: Array,
    w: Array,
    b: Array | None = None,
    bias: Array | None = None,
    scale: Array | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    k: int,
    sigmoid: int = 0,
    groups: int = 1,
    kept: int = 1,
    renormalise: int = 1,
    factor: float = 1.0,
) -> tuple[Array, ...]:
    normed = rms_norm.reference(x, g, eps=eps, offset=offset)
    router = dict(k=k, sigmoid=sigmoid, groups=groups, kept=kept, renormalise=renormalise, factor=factor)
    experts, weights = route.reference(linear.reference(normed, w, b), bias, scale, **router)
    return *sort_pairs.reference(experts, E=len(w)), normed, experts, weights


def _kernels(call: Call, device: Device) -> Plan:
    n, E = call["n"], call["E"]
    if n > MAX_STREAMED_ROWS:
        raise OpError(f"rms_norm_route: {n} rows are more than the {MAX_STREAMED_ROWS} that the kernel takes")
    row = -(-call["d"] // 8) * 8 * call.dtypes["T"].itemsize
    room = (device.shared - _RESERVED_BYTES) // row
    if not room:
        raise OpError(f"rms_norm_route: a block's shared memory does not hold a row of {call['d']} elements")
    rows = 1 if n == 1 else min(MAX_STREAMED_ROWS, 1 << room.bit_length() - 1)  # at a time; few sizes to compile
    constants = {"EACH": lane_experts(call), "ROWS": rows}
    grid = (-(-E // _WARPS),)
    launch = Launch("norm_route.cu:rms_norm_route", grid, (_WARPS * _WARP,), min(n, rows) * row, constants)
    return Plan((launch,), {"logits": ((n, E), "f32"), "finished": ((1,), "u32")}, frozenset({"finished"}))


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Rows whose best experts have logits further apart than what the rounding of the norm changes. A bias tells groups
    apart by more than scores do."""
    E, d, groups = case["E"], case["d"], case.get("groups", 1)
    w = (_SPREAD / np.sqrt(d) * rng.standard_normal((E, d))).astype(T)
    b = rng.standard_normal(E).astype(T)
    bias = np.repeat(2.0 * rng.permutation(groups), E // groups) if groups > 1 else rng.integers(0, 2, E)
    x = np.empty((case["n"], d), np.float32)
    for row in x:
        while True:
            row[:] = rng.standard_normal(d)
            logits = upcast(w) @ row / np.sqrt(np.mean(row**2)) + case["b"] * upcast(b)
            best = np.sort(logits.reshape(groups, -1) + bias.reshape(groups, -1) * case["bias"] * _APART)
            if np.diff(best[:, -case["k"] - 1 :]).min(initial=_GAP) >= _GAP:
                break
    given = {"x": x, "w": w, "g": np.ones(d, T) - T.type(case.get("offset", 0)), "b": b}
    return given | {"bias": bias.astype(np.float32)}


def _sizes(draw: Draw) -> dict[str, Any]:
    E = draw(1, 60)
    return dict(n=draw(1, 8), d=draw(1, 200), E=E, k=draw(1, min(E, 10)), b=False, bias=False, scale=bool(draw(0, 1)),
                sigmoid=draw(0, 1), renormalise=draw(0, 1), factor=2.5, eps=1e-6, offset=draw(0, 1))  # fmt: skip


_NEITHER = dict(b=False, bias=False, scale=False, eps=1e-6)

rms_norm_route = Op(
    "rms_norm_route",
    "pairs[n*k]:i32, offsets[E+1]:i32, normed[n,d]:T, experts[n,k]:i32, weights[n,k]:f32 = (x[n,d]:f32, g[d]:T,"
    " w[E,d]:T, b[E]:T?, bias[E]:f32?, scale[E]:f32?, eps:f32, offset:f32=0, k:i32, sigmoid:i32=0, groups:i32=1,"
    " kept:i32=1, renormalise:i32=1, factor:f32=1)",
    doc="normed = rms_norm(x) with the scale g; the experts and weights that route chooses for the logits"
    " normed w^T + b, with its bias, scale and attributes; and the pairs of rows and experts as sort_pairs gives them.",
    reference=_reference,
    kernels=_kernels,
    cases=[
        dict(n=1, d=64, E=8, k=2, **_NEITHER),
        dict(n=2, d=100, E=37, k=4, **_NEITHER, offset=1),
        dict(n=8, d=72, E=128, k=8, **_NEITHER, renormalise=0),
        dict(n=2, d=1100, E=5, k=2, **_NEITHER),
        dict(n=3, d=520, E=60, k=32, **_NEITHER, sigmoid=1, factor=2.5),
        dict(n=5, d=48, E=64, k=6, b=True, bias=True, scale=True, sigmoid=1, groups=8, kept=4, eps=1e-6),
    ],
    sizes=_sizes,
    inputs=_inputs,
    shape=dict(n=1, d=2048, E=128, k=8, **_NEITHER),
    rules=route.rules,
    # Of the weights: the rounding of the norm to T, in logits of up to about 3.
    tolerance={"f32": 64.0, "f16": 1.25, "bf16": 1.25, "f16:f32": 5000.0, "bf16:f32": 40000.0},
    flops=lambda c: 2 * c["n"] * c["E"] * c["d"],
)
