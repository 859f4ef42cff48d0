"""Normalisations. Kernels: cuda_src/norm.cu.

rms_norm: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
layer_norm: Ba, Kiros & Hinton, "Layer Normalization", arXiv:1607.06450.
qk_norm: RMSNorm over each query and key head, as Qwen3 has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError

__all__ = ["MAX_NORM_ELEMENTS", "layer_norm", "qk_norm", "rms_norm", "row_launch"]

_CASES = [dict(n=n, d=d, eps=1e-5) for n, d in ((1, 64), (3, 8), (2, 100), (5, 896), (1, 4096), (2, 5120), (1, 12288))]


def _rms_norm(x: Array, w: Array, *, eps: float) -> Array:
    x = upcast(x)
    mean_square = np.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1]
    return x / np.sqrt(mean_square + eps) * upcast(w)


def _layer_norm(x: Array, w: Array, b: Array, *, eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * upcast(w) + upcast(b)


def _qk_norm(x: Array, q_norm: Array, k_norm: Array, *, num_heads: int, num_kv_heads: int, eps: float) -> Array:
    d = len(q_norm)
    y = upcast(x).reshape(len(x), num_heads + 2 * num_kv_heads, d).copy()
    y[:, :num_heads] = _rms_norm(y[:, :num_heads], q_norm, eps=eps)
    y[:, num_heads : num_heads + num_kv_heads] = _rms_norm(y[:, num_heads : num_heads + num_kv_heads], k_norm, eps=eps)
    return y.reshape(len(x), -1)


_WIDTH = 8  # elements that a thread takes at once, as in the kernels
_MAX_THREADS = 1024  # of a block, which has one row
_MAX_CHUNKS = 2  # times _WIDTH elements that a thread of so large a block holds without spilling registers
MAX_NORM_ELEMENTS = _WIDTH * _MAX_THREADS * _MAX_CHUNKS
"""Elements of a row that ``rms_norm`` and ``layer_norm`` take on a GPU."""
_BLOCK_HEADS = 4  # heads that a block of qk_norm takes, one for each warp


def _head_sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 9), num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=draw(1, 300), eps=1e-6)


def row_launch(kernel: str, rows: int, d: int) -> Launch:
    """The launch of ``rms_norm`` or ``layer_norm`` for that many rows of d elements; OpError if they are too long."""
    vectors = -(-d // _WIDTH)
    threads = min(_MAX_THREADS, -(-vectors // 32) * 32)
    chunks = -(-vectors // threads)
    if d > MAX_NORM_ELEMENTS:
        raise OpError(f"{kernel}: d is {d}; the kernel takes at most {MAX_NORM_ELEMENTS}")
    return Launch(f"norm.cu:{kernel}", (rows,), (threads,), constants={"CHUNKS": chunks})


def _row_kernels(call: Call, device: Device) -> Plan:
    return Plan((row_launch(call.op.name, call["n"], call["d"]),))


def _qk_kernels(call: Call, device: Device) -> Plan:
    blocks = -(-call["n"] * (call["num_heads"] + 2 * call["num_kv_heads"]) // _BLOCK_HEADS)
    chunks = -(-call["D"] // (32 * _WIDTH))
    return Plan((Launch("norm.cu:qk_norm", (blocks,), (32 * _BLOCK_HEADS,), constants={"CHUNKS": chunks}),))


def _row_gradient(g: Gradient) -> None:
    dx, weights = g.fresh("x"), [name for name in ("w", "b") if g.has(name)]
    into = tuple(map(g.into, weights))
    ins = (g["x"], g["w"], g.of("y"), *into, g.so_far("x"))
    g.update(f"{g.op}_backward", (dx, *into), ins, eps=g.attr("eps"))
    g.give("x", dx)


def _qk_gradient(g: Gradient) -> None:
    dx, into = g.fresh("x"), (g.into("q_norm"), g.into("k_norm"))
    attrs = {name: g.attr(name) for name in ("num_heads", "num_kv_heads", "eps")}
    ins = (g["x"], g["q_norm"], g["k_norm"], g.of("y"), *into)
    g.update("qk_norm_backward", (dx, *into), ins, **attrs)
    g.give("x", dx)


# Units of float32's rounding. The scale of a row is one number: its error, of a sum of up to 12,288 squares, is a
# factor that all elements of the row have in common, and the judge admits half of the tolerance as such a factor.
_ROW_TOLERANCE = {"f32": 12.0}

rms_norm = Op(
    "rms_norm",
    "y[n,d]:T = (x[n,d]:f32, w[d]:T, eps:f32)",
    doc="y = x / sqrt(mean(x^2) + eps) * w",
    reference=_rms_norm,
    gradient=_row_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 9000), eps=1e-6),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 4 * c["n"] * c["d"],
)

layer_norm = Op(
    "layer_norm",
    "y[n,d]:T = (x[n,d]:f32, w[d]:T, b[d]:T, eps:f32)",
    doc="y = (x - mean(x)) / sqrt(var(x) + eps) * w + b",
    reference=_layer_norm,
    gradient=_row_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(2, 9000), eps=1e-5),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 7 * c["n"] * c["d"],
)

qk_norm = Op(
    "qk_norm",
    "y[n,(num_heads+2*num_kv_heads)*D]:T = (x[n,(num_heads+2*num_kv_heads)*D]:T, q_norm[D]:T, k_norm[D]:T,"
    " num_heads:i32, num_kv_heads:i32, eps:f32)",
    doc="RMSNorm of every query head (weight q_norm) and key head (weight k_norm); value heads are copied.",
    reference=_qk_norm,
    gradient=_qk_gradient,
    recompute="layers",
    kernels=_qk_kernels,
    cases=[
        dict(n=n, num_heads=h, num_kv_heads=k, D=d, eps=1e-6)
        for n, h, k, d in ((1, 4, 2, 64), (3, 1, 1, 8), (5, 3, 1, 80), (2, 32, 8, 128), (1, 2, 2, 256))
    ],
    sizes=_head_sizes,
    flops=lambda c: 4 * c["n"] * (c["num_heads"] + c["num_kv_heads"]) * c["D"],
)
