"""The optimizer's arithmetic over flat arrays. Kernels: cuda_src/optimizer.cu.

AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, narrow
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .team import fill_rows

__all__ = ["adamw", "square_sum"]

_THREADS, _WIDTH = 256, 4  # as in the kernels
_COST = 24  # of an element, in multiply-adds
_SUMS = 1024  # blocks of square_sum: what one block of square_sum_total adds
_WAVES = 16  # blocks of adamw for each multiprocessor


def _square_sum(g: Array) -> Array:
    return np.dot(g, g)[None]


def _adamw(
    p: Array, g: Array, m: Array, v: Array, master: Array, norm_squared: Array, schedule: Array,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, clip: float,
) -> tuple[Array, ...]:  # fmt: skip
    lr, unbias1, unbias2 = schedule
    limit = min(1.0, clip / (np.sqrt(norm_squared[0]) + 1e-6)) if clip else 1.0

    def piece(rows: slice) -> Array:
        grad = g[rows] * limit
        m[rows] += (grad - m[rows]) * (1 - beta1)
        v[rows] *= beta2
        v[rows] += (1 - beta2) * grad * grad
        master[rows] *= 1 - lr * weight_decay
        master[rows] -= lr * unbias1 * m[rows] / (np.sqrt(v[rows] * unbias2) + eps)
        return narrow(master[rows], p.dtype)

    if np.isfinite(norm_squared[0]):
        fill_rows(p, piece, _COST)
    g[...] = 0
    return p, g, m, v, master


def _blocks(n: int) -> int:
    return -(-(n + _WIDTH - 1) // (_THREADS * _WIDTH))  # an array may begin inside of a four


def _sum_kernels(call: Call, device: Device) -> Plan:
    blocks = min(_SUMS, -(-_blocks(call["n"]) // 4))
    launches = (
        Launch("optimizer.cu:square_sum", (blocks,), (_THREADS,)),
        Launch("optimizer.cu:square_sum_total", (1,), (-(-blocks // 32) * 32,), constants={"blocks": blocks}),
    )
    return Plan(launches, {"partial": ((blocks,), "f32")})


def _adamw_kernels(call: Call, device: Device) -> Plan:
    blocks = min(_blocks(call["n"]), _WAVES * device.sms)
    rest = {"rest1": 1 - call["beta1"], "rest2": 1 - call["beta2"]}
    return Plan((Launch("optimizer.cu:adamw", (blocks,), (_THREADS,), constants=rest),))


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """A model some steps after its start: the moments are of gradients, and its weights the masters, rounded."""
    n, gradients = case["n"], rng.standard_normal((3, case["n"]), np.float32)
    master = rng.standard_normal(n, np.float32)
    norm_squared = np.array([case.get("norm_squared", 4.0)], np.float32)
    correction = [1 / (1 - case[beta] ** 7) for beta in ("beta1", "beta2")]
    return {
        "p": narrow(master, T),
        "g": gradients[0],
        "m": 0.5 * gradients[1],
        "v": (1 - case["beta2"]) * 7 * gradients[2] ** 2,
        "master": master,
        "norm_squared": norm_squared,
        "schedule": np.array([0.01, *correction], np.float32),
    }


def _case(n: int, **other: Any) -> dict[str, Any]:
    return dict(n=n, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, clip=1.0) | other


def _sizes(draw: Draw) -> dict[str, Any]:
    return _case(draw(1, 20000), beta2=0.95, clip=float(draw(0, 3)))


square_sum = Op(
    "square_sum",
    "total[1]:f32 = (g[n]:f32)",
    doc="total = sum(g^2), of all gradients: the square of their norm",
    reference=_square_sum,
    kernels=_sum_kernels,
    kernel_docs={
        "square_sum": "The sum of squares of each of at most 1,024 parts of an array.",
        "square_sum_total": "Adds up the sums of the parts.",
    },
    cases=[dict(n=n) for n in (1, 7, 1024, 4099, 70001)],
    sizes=lambda draw: dict(n=draw(1, 50000)),
    shape=dict(n=1 << 25),
    tolerance={"f32": 8.0},  # units of its rounding: a single number, of at most a few hundred sums one after the other
    flops=lambda c: 2 * c["n"],
)

adamw = Op(
    "adamw",
    "p[n]:T, g[n]:f32, m[n]:f32, v[n]:f32, master[n]:f32 = (p[n]:T, g[n]:f32, m[n]:f32, v[n]:f32, master[n]:f32,"
    " norm_squared[1]:f32, schedule[3]:f32, beta1:f32, beta2:f32, eps:f32, weight_decay:f32, clip:f32)",
    doc="A step of AdamW on master, and p = master rounded to T; for a model in f32 both are one array. schedule is the"
    " rate of learning, 1 / (1 - beta1^t) and 1 / (1 - beta2^t). g is scaled by min(1, clip / (sqrt(norm_squared) +"
    " 1e-6)), unless clip is 0, and set to 0 afterwards. Only that happens where norm_squared is not finite.",
    reference=_adamw,
    kernels=_adamw_kernels,
    cases=[
        _case(1),
        _case(5, clip=0.0),
        _case(1027, weight_decay=0.0),
        _case(4096, clip=3.0),  # more than the norm: nothing is scaled
        _case(300, norm_squared=np.inf),
        _case(300, norm_squared=np.nan),
    ],
    sizes=_sizes,
    inputs=_inputs,
    shape=_case(1 << 24),
    # p is written alone, and read alone where it is the master itself.
    bytes=lambda c: c["n"] * (32 + c.dtypes["T"].itemsize),
    flops=lambda c: 14 * c["n"],
)
