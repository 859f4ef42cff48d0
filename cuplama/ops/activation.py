"""Activations of the feed-forward layer. Kernels: cuda_src/activation.cu.

silu_mul, gelu_tanh_mul, gelu_erf_mul: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
gelu: Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
relu_squared: So et al., "Primer", arXiv:2109.08668.
xielu: Huang & Schlag, "Deriving Activation Functions Using Integration", arXiv:2411.13010.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .team import fill_rows

__all__ = [
    "erf", "gelu_erf", "gelu_erf_mul", "gelu_tanh", "gelu_tanh_mul", "gelu_tanh_mul_part", "relu_squared",
    "sigmoid_mul", "silu_mul", "xielu",
]  # fmt: skip

_CASES = [dict(n=n, f=f) for n, f in ((1, 64), (3, 8), (2, 172), (1, 4864), (5, 1000))]
_CUPY_SILU = "float a = (float)g; y = (T)(a / (1.0f + expf(-a)) * (float)u)"
_CUPY_GELU = "float a = (float)x; y = (T)(0.5f * a * (1.0f + tanhf(0.79788456f * (a + 0.044715f * a * a * a))))"
_COST = 16  # of an element with its exponential, in multiply-adds
_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The error function of each element, in x's dtype."""
    return np.asarray(_erf(x)).astype(x.dtype)


def _mul(activation: Callable[[Array], Array], x: Array) -> Array:
    x = upcast(x)
    f = x.shape[-1] // 2

    def piece(rows: slice) -> Array:
        return activation(x[rows, :f]) * x[rows, f:]

    return fill_rows(np.empty((len(x), f), x.dtype), piece, _COST)


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return x / (1 + np.exp(-x))


def _gelu_tanh(x: Array) -> Array:
    x = upcast(x)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _gelu_erf(x: Array) -> Array:
    x = upcast(x)
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def _gelu_tanh_mul_part(x: Array, u: Array, *, first: int) -> Array:
    return _gelu_tanh(x) * u[:, first : first + x.shape[1]]


def _relu_squared(x: Array) -> Array:
    return np.maximum(upcast(x), 0) ** 2


def _sigmoid_mul(x: Array, gate: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, 0
        return upcast(x) / (1 + np.exp(-upcast(gate)))


def _xielu(x: Array, alpha_p: Array, alpha_n: Array, *, beta: float, eps: float) -> Array:
    x = upcast(x)
    above, below = np.logaddexp(0, upcast(alpha_p)), beta + np.logaddexp(0, upcast(alpha_n))
    return beta * x + np.where(x > 0, above * x * x, below * (np.expm1(np.minimum(x, eps)) - x))


def _sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 5), f=draw(1, 3000))


@cache
def _cupy_kernel(parameters: str, text: str, name: str) -> Any:
    import cupy

    return cupy.ElementwiseKernel(parameters, "T y", text, name)


def _cupy_silu_mul(y: Array, x: Array) -> None:
    f = y.shape[1]
    _cupy_kernel("T g, T u", _CUPY_SILU, "cupy_silu_mul")(x[:, :f], x[:, f:], y)


def _cupy_gelu_tanh(y: Array, x: Array) -> None:
    _cupy_kernel("T x", _CUPY_GELU, "cupy_gelu_tanh")(x, y)


_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _row_kernels(call: Call, device: Device) -> Plan:
    grid = (call["n"], -(-call["f"] // (8 * _THREADS)))
    return Plan((Launch(f"activation.cu:{call.op.name}", grid, (_THREADS,)),))


def _flat_kernels(call: Call, device: Device) -> Plan:
    grid = (-(-call["n"] * call["f"] // (8 * _THREADS)),)
    return Plan((Launch(f"activation.cu:{call.op.name}", grid, (_THREADS,)),))


def _pair_kernels(call: Call, device: Device) -> Plan:
    grid = (-(-call["n"] * call["m"] // (8 * _THREADS)),)
    return Plan((Launch(f"activation.cu:{call.op.name}", grid, (_THREADS,)),))


def _gradient(g: Gradient) -> None:
    g.give("x", g.emit(f"{g.op}_backward", g["x"], g.of("y")))


silu_mul = Op(
    "silu_mul",
    "y[n,f]:T = (x[n,2*f]:T)",
    doc="y = silu(gate) * up with x = [gate, up] and silu(a) = a / (1 + exp(-a))",
    reference=partial(_mul, _silu),
    gradient=_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=_sizes,
    flops=lambda c: 5 * c["n"] * c["f"],
    library=_cupy_silu_mul,
)

gelu_tanh_mul = Op(
    "gelu_tanh_mul",
    "y[n,f]:T = (x[n,2*f]:T)",
    doc="y = gelu(gate) * up with x = [gate, up] and gelu(a) = a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3)))",
    reference=partial(_mul, _gelu_tanh),
    gradient=_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 9216},
    flops=lambda c: 9 * c["n"] * c["f"],
)

gelu_erf_mul = Op(
    "gelu_erf_mul",
    "y[n,f]:T = (x[n,2*f]:T)",
    doc="y = gelu(gate) * up with x = [gate, up] and gelu(a) = a/2 (1 + erf(a / sqrt(2)))",
    reference=partial(_mul, _gelu_erf),
    gradient=_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 9216},
    flops=lambda c: 6 * c["n"] * c["f"],
)

gelu_tanh_mul_part = Op(
    "gelu_tanh_mul_part",
    "y[n,f]:T = (x[n,f]:T, u[n,m]:f32, first:i32)",
    doc="y = gelu(x) * u[:, first : first + f] with the gelu of gelu_tanh: what a layer is given beside the residual"
    " stream, of a row that holds as much for every layer",
    reference=_gelu_tanh_mul_part,
    kernels=_row_kernels,
    cases=[
        dict(n=n, f=f, m=m, first=first)
        for n, f, m, first in (
            (1, 256, 10752, 768),
            (3, 8, 24, 16),
            (2, 20, 40, 20),
            (5, 1000, 1000, 0),
            (2, 16, 48, 5),
        )
    ],
    sizes=lambda draw: dict(n=draw(1, 5), f=draw(1, 600), m=1600, first=draw(0, 1000)),
    rules=("first + f <= m",),
    shape={"n": 1, "f": 256, "m": 10752, "first": 256},
    bytes=lambda c: c["n"] * c["f"] * (4 + 2 * c.dtypes["T"].itemsize),
    flops=lambda c: 9 * c["n"] * c["f"],
)

gelu_tanh = Op(
    "gelu_tanh",
    "y[n,f]:T = (x[n,f]:T)",
    doc="y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))",
    reference=_gelu_tanh,
    gradient=_gradient,
    recompute="cheap",
    kernels=_flat_kernels,
    cases=_CASES,
    sizes=_sizes,
    flops=lambda c: 8 * c["n"] * c["f"],
    library=_cupy_gelu_tanh,
)

gelu_erf = Op(
    "gelu_erf",
    "y[n,f]:T = (x[n,f]:T)",
    doc="y = x/2 (1 + erf(x / sqrt(2)))",
    reference=_gelu_erf,
    gradient=_gradient,
    recompute="cheap",
    kernels=_flat_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 3072},
    flops=lambda c: 5 * c["n"] * c["f"],
)

relu_squared = Op(
    "relu_squared",
    "y[n,f]:T = (x[n,f]:T)",
    doc="y = max(x, 0)^2",
    reference=_relu_squared,
    gradient=_gradient,
    recompute="cheap",
    kernels=_flat_kernels,
    cases=_CASES,
    sizes=_sizes,
    shape={"n": 1, "f": 18432},
    flops=lambda c: 2 * c["n"] * c["f"],
)

xielu = Op(
    "xielu",
    "y[n,f]:T = (x[n,f]:T, alpha_p[1]:T, alpha_n[1]:T, beta:f32, eps:f32)",
    doc="y = beta x + (p x^2 where x > 0, else q (exp(min(x, eps)) - 1 - x)), with p = softplus(alpha_p),"
    " q = beta + softplus(alpha_n) and softplus(a) = log(1 + exp(a))",
    reference=_xielu,
    kernels=_flat_kernels,
    cases=[dict(**case, beta=0.5, eps=-1e-6) for case in _CASES],
    sizes=lambda draw: dict(**_sizes(draw), beta=0.25 * draw(0, 4), eps=-0.125 * draw(0, 2)),
    shape={"n": 1, "f": 21504},
    flops=lambda c: 8 * c["n"] * c["f"],
)

sigmoid_mul = Op(
    "sigmoid_mul",
    "y[n,m]:T = (x[n,m]:T, gate[n,m]:T)",
    doc="y = x / (1 + exp(-gate)): what attention gave, through its output gate",
    reference=_sigmoid_mul,
    kernels=_pair_kernels,
    cases=[dict(n=case["n"], m=case["f"]) for case in _CASES],
    sizes=lambda draw: dict(n=draw(1, 5), m=draw(1, 3000)),
    shape={"n": 1, "m": 6144},
    flops=lambda c: 4 * c["n"] * c["m"],
)
