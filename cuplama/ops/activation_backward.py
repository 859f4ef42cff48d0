"""Gradients of the activations. Kernels: cuda_src/activation_backward.cu."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .activation import erf
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .team import fill_rows

__all__ = [
    "gelu_erf_backward",
    "gelu_erf_mul_backward",
    "gelu_tanh_backward",
    "gelu_tanh_mul_backward",
    "relu_squared_backward",
    "silu_mul_backward",
]

_COST = 24  # of an element with its exponential, in multiply-adds
_CASES = [dict(n=n, f=f) for n, f in ((1, 64), (3, 8), (2, 172), (1, 4864), (5, 1000))]


def _mul_backward(curve: Callable[[Array], tuple[Array, Array]], x: Array, dy: Array) -> Array:
    """curve: the activation of each element, and its slope there."""
    x, dy = upcast(x), upcast(dy)
    f = dy.shape[-1]

    def piece(rows: slice) -> Array:
        gate, slope = curve(x[rows, :f])
        return np.concatenate([dy[rows] * x[rows, f:] * slope, dy[rows] * gate], axis=-1)

    return fill_rows(np.empty_like(x), piece, _COST)


def _silu(x: Array) -> tuple[Array, Array]:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limits, 0
        sigmoid = 1 / (1 + np.exp(-x))
    silu = x * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _gelu_erf(x: Array) -> tuple[Array, Array]:
    share = 0.5 * (1 + erf(x * math.sqrt(0.5)))
    return x * share, share + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_backward(x: Array, dy: Array) -> Array:
    return upcast(dy) * _gelu_tanh(upcast(x))[1]


def _gelu_erf_backward(x: Array, dy: Array) -> Array:
    return upcast(dy) * _gelu_erf(upcast(x))[1]


def _relu_squared_backward(x: Array, dy: Array) -> Array:
    return upcast(dy) * 2 * np.maximum(upcast(x), 0)


def _sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 5), f=draw(1, 3000))


_THREADS = 128  # as in the forward kernels: a row of 3,072 is three whole blocks


def _row_kernels(call: Call, device: Device) -> Plan:
    grid = (call["n"], -(-call["f"] // (8 * _THREADS)))
    return Plan((Launch(f"activation_backward.cu:{call.op.name}", grid, (_THREADS,)),))


def _flat_kernels(call: Call, device: Device) -> Plan:
    grid = (-(-call["n"] * call["f"] // (8 * _THREADS)),)
    return Plan((Launch(f"activation_backward.cu:{call.op.name}", grid, (_THREADS,)),))


silu_mul_backward = Op(
    "silu_mul_backward",
    "dx[n,2*f]:T = (x[n,2*f]:T, dy[n,f]:T)",
    doc="The gradient of silu_mul for gate and up, which lie side by side as in x.",
    reference=partial(_mul_backward, _silu),
    kernels=_row_kernels,
    cases=_CASES,
    sizes=_sizes,
    flops=lambda c: 11 * c["n"] * c["f"],
)

gelu_tanh_mul_backward = Op(
    "gelu_tanh_mul_backward",
    "dx[n,2*f]:T = (x[n,2*f]:T, dy[n,f]:T)",
    doc="The gradient of gelu_tanh_mul for gate and up, which lie side by side as in x.",
    reference=partial(_mul_backward, _gelu_tanh),
    kernels=_row_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 9216},
    flops=lambda c: 24 * c["n"] * c["f"],
)

gelu_erf_mul_backward = Op(
    "gelu_erf_mul_backward",
    "dx[n,2*f]:T = (x[n,2*f]:T, dy[n,f]:T)",
    doc="The gradient of gelu_erf_mul for gate and up, which lie side by side as in x.",
    reference=partial(_mul_backward, _gelu_erf),
    kernels=_row_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 9216},
    flops=lambda c: 16 * c["n"] * c["f"],
)

gelu_tanh_backward = Op(
    "gelu_tanh_backward",
    "dx[n,f]:T = (x[n,f]:T, dy[n,f]:T)",
    doc="The gradient of gelu_tanh.",
    reference=_gelu_tanh_backward,
    kernels=_flat_kernels,
    cases=_CASES,
    sizes=_sizes,
    flops=lambda c: 15 * c["n"] * c["f"],
)

gelu_erf_backward = Op(
    "gelu_erf_backward",
    "dx[n,f]:T = (x[n,f]:T, dy[n,f]:T)",
    doc="The gradient of gelu_erf.",
    reference=_gelu_erf_backward,
    kernels=_flat_kernels,
    cases=_CASES,
    sizes=_sizes,
    flops=lambda c: 9 * c["n"] * c["f"],
)

relu_squared_backward = Op(
    "relu_squared_backward",
    "dx[n,f]:T = (x[n,f]:T, dy[n,f]:T)",
    doc="The gradient of relu_squared.",
    reference=_relu_squared_backward,
    kernels=_flat_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 18432},
    flops=lambda c: 3 * c["n"] * c["f"],
)
