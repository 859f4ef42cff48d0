"""The optimizer's arithmetic over flat arrays. Kernels: cuda_src/optimizer.cu.

AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array
from .op import Op

__all__ = ["adamw", "square_sum"]


def _square_sum(g: Array) -> Array:
    return np.dot(g, g)[None]


def _adamw(
    p: Array, g: Array, m: Array, v: Array, master: Array, norm_squared: Array, schedule: Array,
    *, beta1: float, beta2: float, eps: float, weight_decay: float, clip: float,
) -> tuple[Array, ...]:  # fmt: skip
    if np.isfinite(norm_squared[0]):
        lr, unbias1, unbias2 = schedule
        grad = g * min(1.0, clip / (np.sqrt(norm_squared[0]) + 1e-6)) if clip else g
        m += (grad - m) * (1 - beta1)
        v *= beta2
        v += (1 - beta2) * grad * grad
        master *= 1 - lr * weight_decay
        master -= lr * unbias1 * m / (np.sqrt(v * unbias2) + eps)
        p[...] = master
    g[...] = 0
    return p, g, m, v, master


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    master = rng.standard_normal(case["n"]).astype(np.float32)
    return {
        "master": master,
        "p": master.astype(T),
        "v": np.square(rng.standard_normal(case["n"])).astype(np.float32),
        "norm_squared": np.array([case.get("norm_squared", 4.0)], np.float32),
        "schedule": np.array([0.01, 1.25, 3.0], np.float32),
    }


square_sum = Op(
    "square_sum",
    "total[1]:f32 = (g[n]:f32)",
    doc="total = sum(g^2)",
    reference=_square_sum,
    cases=[dict(n=n) for n in (1, 33, 1000, 70000)],
    sizes=lambda draw: dict(n=draw(1, 90000)),
)

adamw = Op(
    "adamw",
    "p[n]:T, g[n]:f32, m[n]:f32, v[n]:f32, master[n]:f32 = (p[n]:T, g[n]:f32, m[n]:f32, v[n]:f32, master[n]:f32,"
    " norm_squared[1]:f32, schedule[3]:f32, beta1:f32, beta2:f32, eps:f32, weight_decay:f32, clip:f32)",
    doc="A step of AdamW on the gradient g, times min(1, clip / sqrt(norm_squared)) where clip is not 0. schedule: the"
    " learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t) of step t. p becomes the master rounded; both may be one"
    " array. g becomes 0, for the next step. If norm_squared is not finite, nothing else changes.",
    reference=_adamw,
    cases=[
        dict(n=n, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=w, clip=c, norm_squared=s)
        for n, w, c, s in ((1, 0.1, 0.0, 4.0), (33, 0.0, 1.0, 4.0), (1000, 0.1, 1.0, 0.04), (130, 0.1, 1.0, np.inf))
    ],
    sizes=lambda draw: dict(n=draw(1, 9000), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip=1.0),
    inputs=_inputs,
)
