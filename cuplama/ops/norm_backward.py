"""Gradients of the normalisations. Kernels: cuda_src/norm_backward.cu.

With xhat = x / s, s = sqrt(mean(x^2) + eps), and h = dy * w: dx = (h - xhat * mean(h * xhat)) / s, and dw sums
dy * xhat over the rows. For layer_norm x and h lose their means as well.
"""

from __future__ import annotations

from ..dtypes import Array, upcast
from .op import Op

__all__ = ["layer_norm_backward", "qk_norm_backward", "rms_norm_backward"]

_CASES = [
    dict(n=n, d=d, eps=1e-5, a=a)
    for n, d, a in ((1, 64, False), (3, 8, True), (2, 100, True), (5, 896, False), (7, 333, True), (2, 5120, True))
]


def _mean(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


def _rms_backward(x: Array, w: Array, dy: Array, eps: float) -> tuple[Array, Array]:
    """(dx, dy * xhat) of rows [..., d]."""
    x, w, dy = upcast(x), upcast(w), upcast(dy)
    inverse = 1 / (_mean(x * x) + eps) ** 0.5
    xhat, h = x * inverse, dy * w
    return (h - xhat * _mean(h * xhat)) * inverse, dy * xhat


def _rms_norm_backward(
    x: Array, w: Array, dy: Array, dw: Array, a: Array | None = None, *, eps: float
) -> tuple[Array, Array]:
    dx, scaled = _rms_backward(x, w, dy, eps)
    dw += scaled.sum(0)
    return dx if a is None else dx + a, dw


def _layer_norm_backward(
    x: Array, w: Array, dy: Array, dw: Array, db: Array, a: Array | None = None, *, eps: float
) -> tuple[Array, Array, Array]:
    x, w, dy = upcast(x), upcast(w), upcast(dy)
    x = x - _mean(x)
    inverse = 1 / (_mean(x * x) + eps) ** 0.5
    xhat, h = x * inverse, dy * w
    dx = (h - _mean(h) - xhat * _mean(h * xhat)) * inverse
    dw += (dy * xhat).sum(0)
    db += dy.sum(0)
    return dx if a is None else dx + a, dw, db


def _qk_norm_backward(
    x: Array, q_norm: Array, k_norm: Array, dy: Array, dq_norm: Array, dk_norm: Array,
    *, num_heads: int, num_kv_heads: int, eps: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    shape = len(x), num_heads + 2 * num_kv_heads, len(q_norm)
    x, dx = upcast(x).reshape(shape), upcast(dy).reshape(shape).copy()
    for heads, w, dw in (
        (slice(num_heads), q_norm, dq_norm),
        (slice(num_heads, num_heads + num_kv_heads), k_norm, dk_norm),
    ):
        dx[:, heads], scaled = _rms_backward(x[:, heads], w, dx[:, heads], eps)
        dw += scaled.sum((0, 1))
    return dx.reshape(len(x), -1), dq_norm, dk_norm


rms_norm_backward = Op(
    "rms_norm_backward",
    "dx[n,d]:f32, dw[d]:f32 = (x[n,d]:f32, w[d]:T, dy[n,d]:T, dw[d]:f32, a[n,d]:f32?, eps:f32)",
    doc="The gradient of rms_norm: dx, plus a where it is given; what w's gradient grows by is added to dw.",
    reference=_rms_norm_backward,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 9), d=draw(2, 3000), eps=1e-5, a=bool(draw(0, 1))),
)

layer_norm_backward = Op(
    "layer_norm_backward",
    "dx[n,d]:f32, dw[d]:f32, db[d]:f32 = (x[n,d]:f32, w[d]:T, dy[n,d]:T, dw[d]:f32, db[d]:f32, a[n,d]:f32?, eps:f32)",
    doc="The gradient of layer_norm: dx, plus a where it is given; those of w and b are added to dw and db.",
    reference=_layer_norm_backward,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 9), d=draw(2, 3000), eps=1e-5, a=bool(draw(0, 1))),
)

qk_norm_backward = Op(
    "qk_norm_backward",
    "dx[n,(num_heads+2*num_kv_heads)*D]:T, dq_norm[D]:f32, dk_norm[D]:f32 = (x[n,(num_heads+2*num_kv_heads)*D]:T,"
    " q_norm[D]:T, k_norm[D]:T, dy[n,(num_heads+2*num_kv_heads)*D]:T, dq_norm[D]:f32, dk_norm[D]:f32,"
    " num_heads:i32, num_kv_heads:i32, eps:f32)",
    doc="The gradient of qk_norm; those of its weights are added to dq_norm and dk_norm.",
    reference=_qk_norm_backward,
    cases=[
        dict(n=n, num_heads=h, num_kv_heads=k, D=d, eps=1e-6)
        for n, h, k, d in ((1, 4, 2, 64), (3, 1, 1, 8), (5, 3, 1, 80), (2, 32, 8, 128), (1, 2, 2, 256))
    ],
    sizes=lambda draw: dict(n=draw(1, 9), num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=draw(1, 300), eps=1e-6),
)
