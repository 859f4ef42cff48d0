"""A soft limit of scores and logits, as Gemma 2 has it. Kernels: cuda_src/softcap.cu."""

from __future__ import annotations

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Op

__all__ = ["softcap", "softcap_backward"]

_CASES = [dict(n=n, d=d, cap=cap) for n, d, cap in ((1, 64, 1.0), (3, 7, 0.5), (2, 896, 30.0), (3, 1001, 2.5))]
_THREADS = 256


def _softcap(x: Array, *, cap: float) -> Array:
    return np.tanh(upcast(x) / cap) * cap


def _softcap_backward(x: Array, dy: Array, *, cap: float) -> Array:
    return upcast(dy) * (1 - np.tanh(upcast(x) / cap) ** 2)


def _gradient(g: Gradient) -> None:
    g.give("x", g.emit("softcap_backward", g["x"], g.of("y"), cap=g.attr("cap")))


def _kernels(call: Call, device: Device) -> Plan:
    grid = (-(-call["n"] * call["d"] // (8 * _THREADS)),)
    return Plan((Launch(f"softcap.cu:{call.op.name}", grid, (_THREADS,)),))


softcap = Op(
    "softcap",
    "y[n,d]:T = (x[n,d]:T, cap:f32)",
    doc="y = cap tanh(x / cap)",
    reference=_softcap,
    kernels=_kernels,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000), cap=0.25 * draw(1, 99)),
    gradient=_gradient,
    recompute="cheap",
    flops=lambda c: 4 * c["n"] * c["d"],
)

softcap_backward = Op(
    "softcap_backward",
    "dx[n,d]:T = (x[n,d]:T, dy[n,d]:T, cap:f32)",
    doc="dx = dy (1 - tanh(x / cap)^2), the gradient of softcap",
    reference=_softcap_backward,
    kernels=_kernels,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000), cap=0.25 * draw(1, 99)),
    flops=lambda c: 8 * c["n"] * c["d"],
)
