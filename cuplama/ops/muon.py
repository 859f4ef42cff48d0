"""Muon: a step along the momentum of a matrix, made orthogonal. Kernels: cuda_src/muon.cu.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024), with
the size of the step of Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982. cuplama/train/muon.py puts
the ops together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, narrow, upcast
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op

__all__ = ["muon_momentum", "muon_normalise", "muon_polynomial", "muon_update"]

_THREADS, _SIDE = 256, 32  # of a block and of its tile, as in the kernels
_SUMS = 256  # parts of a matrix whose squares are added up apart: one for each thread of a block
_WAVES = 16  # blocks of muon_momentum for each multiprocessor
_ROW_THREADS = 128
_EPS = 1e-7
_SHARE = 0.2  # The root mean square of AdamW's steps is about that; see arXiv:2502.16982, section 2.2.


def _momentum(g: Array, m: Array, norm_squared: Array, *, beta: float, clip: float) -> tuple[Array, Array]:
    if not np.isfinite(norm_squared[0]):
        g[...] = 0
        return g, m
    if clip:
        g *= min(1.0, clip / (np.sqrt(norm_squared[0]) + 1e-6))
    m *= beta
    m += g
    g += beta * m
    return g, m


def _normalise(g: Array, *, rows: int, columns: int, U: str = "") -> Array:
    x = g / (np.linalg.norm(g) + _EPS)
    return x if x.shape == (rows, columns) else x.T


def _polynomial(a: Array, b: Array, *, diagonal: float, alpha: float, beta: float) -> Array:
    y = alpha * upcast(a) + beta * upcast(b)
    np.fill_diagonal(y, y.diagonal() + diagonal)
    return y


def _update(
    p: Array, g: Array, master: Array, x: Array, norm_squared: Array, schedule: Array, *, weight_decay: float
) -> tuple[Array, Array, Array]:
    if np.isfinite(norm_squared[0]):
        lr, x = schedule[0], upcast(x)
        master *= 1 - lr * weight_decay
        master -= lr * _scale(*p.shape) * (x if x.shape == p.shape else x.T)
        p[...] = narrow(master, p.dtype)
    g[...] = 0
    return p, g, master


def _scale(m: int, k: int) -> float:
    return _SHARE * math.sqrt(max(m, k))


def _momentum_kernels(call: Call, device: Device) -> Plan:
    blocks = min(-(-call["n"] // (4 * _THREADS)), _WAVES * device.sms)
    return Plan((Launch("muon.cu:muon_momentum", (blocks,), (_THREADS,)),))


def _tiles(call: Call) -> tuple[int, int]:
    return -(-call["m"] // _SIDE), -(-call["k"] // _SIDE)


def _normalise_kernels(call: Call, device: Device) -> Plan:
    n = call["m"] * call["k"]
    blocks = min(_SUMS, -(-n // (16 * _THREADS)))
    constants = {"TRANSPOSED": call["rows"] != call["m"], "blocks": blocks}
    launches = (
        Launch("optimizer.cu:square_sum", (blocks,), (_THREADS,), constants={"n": n}),
        Launch("muon.cu:muon_normalise", _tiles(call), (_THREADS,), constants=constants),
    )
    return Plan(launches, {"partial": ((blocks,), "f32")})


def _polynomial_kernels(call: Call, device: Device) -> Plan:
    grid = (call["m"], -(-call["m"] // (8 * _ROW_THREADS)))
    return Plan((Launch("muon.cu:muon_polynomial", grid, (_ROW_THREADS,)),))


def _update_kernels(call: Call, device: Device) -> Plan:
    constants = {"TRANSPOSED": call["rows"] != call["m"], "scale": _scale(call["m"], call["k"])}
    return Plan((Launch("muon.cu:muon_update", _tiles(call), (_THREADS,), constants=constants),))


def _momentum_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    return {"norm_squared": np.array([case.get("norm_squared", 4.0)], np.float32)}


def _update_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    master = rng.standard_normal((case["m"], case["k"]), np.float32)
    return {
        "p": narrow(master, T),
        "master": master,
        "schedule": np.array([0.01, 2.0, 3.0], np.float32),
        **_momentum_inputs(rng, case, T),
    }


def _turned(m: int, k: int, **other: Any) -> dict[str, Any]:
    """A case whose x lies as the products take it: no more rows than columns."""
    return dict(m=m, k=k, rows=min(m, k), columns=max(m, k)) | other


_MATRICES = [_turned(m, k) for m, k in ((1, 1), (33, 70), (70, 33), (64, 64), (1, 300), (300, 1), (131, 96))]
_TURNS = ("rows * columns == m * k", "rows + columns == m + k")


def _matrix_sizes(draw: Draw) -> dict[str, Any]:
    return _turned(draw(1, 150), draw(1, 150), weight_decay=0.1)


muon_momentum = Op(
    "muon_momentum",
    "g[n]:f32, m[n]:f32 = (g[n]:f32, m[n]:f32, norm_squared[1]:f32, beta:f32, clip:f32)",
    doc="m = beta m + g, g = g + beta m: Nesterov's momentum of gradients. g is scaled by min(1, clip /"
    " (sqrt(norm_squared) + 1e-6)) before, unless clip is 0. Where norm_squared is not finite, m stays and g is 0.",
    reference=_momentum,
    kernels=_momentum_kernels,
    cases=[
        dict(n=1, beta=0.95, clip=1.0),
        dict(n=7, beta=0.95, clip=0.0),
        dict(n=1027, beta=0.5, clip=3.0),  # more than the norm: nothing is scaled
        dict(n=300, beta=0.95, clip=1.0, norm_squared=np.inf),
        dict(n=300, beta=0.95, clip=1.0, norm_squared=np.nan),
    ],
    sizes=lambda draw: dict(n=draw(1, 20000), beta=0.95, clip=float(draw(0, 3))),
    inputs=_momentum_inputs,
    shape=dict(n=1 << 24, beta=0.95, clip=1.0),
    flops=lambda c: 5 * c["n"],
)

muon_normalise = Op(
    "muon_normalise",
    "x[rows,columns]:U = (g[m,k]:f32, rows:i32, columns:i32)",
    doc="x = g / (|g| + 1e-7), where |g| is the root of the sum of g^2; x is the transpose where rows is not m",
    reference=_normalise,
    kernels=_normalise_kernels,
    kernel_docs={
        "square_sum": "The sum of squares of each of at most 256 parts of a matrix.",
        "muon_normalise": "x = g / (|g| + 1e-7), or its transpose.",
    },
    cases=[dict(case, U="T") for case in _MATRICES],
    sizes=lambda draw: dict(_matrix_sizes(draw), U="T"),
    rules=_TURNS,
    shape=_turned(8192, 2048, U="T"),
    flops=lambda c: 3 * c["m"] * c["k"],
)

muon_polynomial = Op(
    "muon_polynomial",
    "y[m,m]:T = (a[m,m]:T, b[m,m]:T, diagonal:f32, alpha:f32, beta:f32)",
    doc="y = diagonal I + alpha a + beta b",
    reference=_polynomial,
    kernels=_polynomial_kernels,
    cases=[dict(m=m, diagonal=3.4445, alpha=-4.775, beta=2.0315) for m in (1, 8, 33, 256)],
    sizes=lambda draw: dict(m=draw(1, 200), diagonal=1.5, alpha=-0.5, beta=0.25),
    shape=dict(m=2048),
    flops=lambda c: 3 * c["m"] * c["m"],
)

muon_update = Op(
    "muon_update",
    "p[m,k]:T, g[m,k]:f32, master[m,k]:f32 = (p[m,k]:T, g[m,k]:f32, master[m,k]:f32, x[rows,columns]:T,"
    " norm_squared[1]:f32, schedule[3]:f32, weight_decay:f32)",
    doc="master = (1 - lr weight_decay) master - lr 0.2 sqrt(max(m, k)) x, and p = master in T; for a model in f32"
    " both are one array. x is transposed where rows is not m; schedule is as of adamw, of which lr counts. g is set to"
    " 0. Only that happens where norm_squared is not finite.",
    reference=_update,
    kernels=_update_kernels,
    cases=[
        *[dict(case, weight_decay=0.1) for case in _MATRICES],
        _turned(40, 24, weight_decay=0.1, norm_squared=np.inf),
        _turned(24, 40, weight_decay=0.1, norm_squared=np.nan),
    ],
    sizes=_matrix_sizes,
    rules=_TURNS,
    inputs=_update_inputs,
    shape=_turned(8192, 2048, weight_decay=0.1),
    bytes=lambda c: c["m"] * c["k"] * (12 + 2 * c.dtypes["T"].itemsize),
    flops=lambda c: 4 * c["m"] * c["k"],
)
