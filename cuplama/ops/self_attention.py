"""Causal grouped-query attention of whole sequences to themselves, without a cache, and its gradient: for training.

Forward: the kernels of attention_prefill_*.cu, whose keys and values are then rows of x. Backward:
cuda_src/attention_backward_*.cu. Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .op import Draw, Op

__all__ = ["self_attention", "self_attention_backward"]

_ATTRIBUTES = ("num_heads", "H", "D", "window", "scale")


def _sequences(cu_seqlens: Array) -> Iterator[slice]:
    bounds = cu_seqlens.tolist()
    return (slice(a, b) for a, b in itertools.pairwise(bounds) if b > a)


def _parts(x: Array, num_heads: int, H: int, D: int) -> tuple[Array, Array, Array]:
    """Queries [H, group, n, D], keys and values [H, 1, n, D] of the rows of a sequence."""
    heads = x.reshape(len(x), -1, D).transpose(1, 0, 2)
    q, k, v = heads[:num_heads], heads[num_heads : num_heads + H], heads[num_heads + H :]
    return q.reshape(H, -1, len(x), D), k[:, None], v[:, None]


def _scores(q: Array, k: Array, window: int, scale: float) -> Array:
    n = q.shape[-2]
    distance = np.arange(n)[:, None] - np.arange(n)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    scores = (q @ k.swapaxes(-1, -2)) * q.dtype.type(scale)
    scores[..., hidden] = -np.inf
    return scores


def _self_attention(
    x: Array, cu_seqlens: Array, *, num_heads: int, H: int, D: int, window: int, scale: float
) -> tuple[Array, Array]:
    x = upcast(x)
    y, lse = np.zeros((len(x), num_heads * D), x.dtype), np.zeros((len(x), num_heads), x.dtype)
    for rows in _sequences(cu_seqlens):
        q, k, v = _parts(x[rows], num_heads, H, D)
        p = _scores(q, k, window, scale)
        most = p.max(-1, keepdims=True)
        np.exp(p - most, out=p)
        total = p.sum(-1, keepdims=True)
        n = p.shape[-1]
        y[rows] = ((p @ v) / total).reshape(num_heads, n, D).transpose(1, 0, 2).reshape(n, -1)
        lse[rows] = (most + np.log(total)).reshape(num_heads, n).T
    return y, lse


def _self_attention_backward(
    x: Array, y: Array, lse: Array, dy: Array, cu_seqlens: Array,
    *, num_heads: int, H: int, D: int, window: int, scale: float,
) -> Array:  # fmt: skip
    x, y, dy = upcast(x), upcast(y), upcast(dy)
    dx = np.zeros_like(x)
    for rows in _sequences(cu_seqlens):
        q, k, v = _parts(x[rows], num_heads, H, D)
        n, shape = q.shape[2], q.shape
        g, out = (a[rows].reshape(n, num_heads, D).transpose(1, 0, 2).reshape(shape) for a in (dy, y))
        p = np.exp(_scores(q, k, window, scale) - lse[rows].T.reshape(*shape[:3], 1))
        ds = p * (g @ v.swapaxes(-1, -2) - (g * out).sum(-1, keepdims=True)) * x.dtype.type(scale)
        dq = (ds @ k).reshape(num_heads, n, D)
        dk, dv = ((s.swapaxes(-1, -2) @ other).sum(1) for s, other in ((ds, q), (p, g)))
        dx[rows] = np.concatenate([dq, dk, dv]).transpose(1, 0, 2).reshape(n, -1)
    return dx


def _case(num_heads: int, H: int, D: int, lengths: list[int], window: int = 0, empty: int = 0) -> dict[str, Any]:
    """A case of sequences of those lengths. empty: sequences without a token behind them."""
    return dict(
        n=sum(lengths), b=len(lengths) + empty, num_heads=num_heads, H=H, D=D, lengths=lengths + [0] * empty,
        window=window, scale=D**-0.5,
    )  # fmt: skip


_CASES = [
    _case(1, 1, 8, [1]),
    _case(4, 2, 64, [5]),
    _case(4, 1, 64, [33, 1, 7], empty=2),
    _case(3, 3, 16, [70], window=16),
    _case(6, 2, 40, [9, 20, 1], window=7),
    _case(2, 1, 128, [65, 64]),
]


def _sizes(draw: Draw) -> dict[str, Any]:
    H, lengths = draw(1, 3), [draw(1, 70) for _ in range(draw(1, 3))]
    return _case(H * draw(1, 4), H, 8 * draw(1, 32), lengths, draw(0, 1) * draw(1, 40), draw(0, 2))


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    return {"cu_seqlens": np.concatenate([[0], np.cumsum(case["lengths"])]).astype(np.int32)}


def _backward_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """y and lse are those of x: other ones would be no gradient."""
    given = _inputs(rng, case, T)
    width = (case["num_heads"] + 2 * case["H"]) * case["D"]
    x = rng.standard_normal((case["n"], width)).astype(np.float32).astype(T)
    attrs = {name: case[name] for name in _ATTRIBUTES}
    y, lse = _self_attention(x, given["cu_seqlens"], **attrs)
    return {**given, "x": x, "y": y.astype(T), "lse": lse.astype(np.float32)}


def _gradient(g: Gradient) -> None:
    attrs = {name: g.attr(name) for name in _ATTRIBUTES}
    ins = (g["x"], g["y"], g["lse"], g.of("y"), g["cu_seqlens"])
    g.give("x", g.emit("self_attention_backward", *ins, **attrs))


self_attention = Op(
    "self_attention",
    "y[n,num_heads*D]:T, lse[n,num_heads]:f32 = (x[n,(num_heads+2*H)*D]:T, cu_seqlens[b+1]:i32, num_heads:i32, H:i32,"
    " D:i32, window:i32, scale:f32)",
    doc="y = softmax(q k^T * scale) v per head, and lse = log(sum(exp(q k^T * scale))). Sequence i is rows"
    " cu_seqlens[i]..cu_seqlens[i+1] of x, which hold queries, keys and values; every row belongs to one. Sequences"
    " may be empty. A token sees itself and what came before, the last `window` tokens only if window > 0."
    " D: a multiple of 8 up to 256.",
    reference=_self_attention,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    gradient=_gradient,
)

self_attention_backward = Op(
    "self_attention_backward",
    "dx[n,(num_heads+2*H)*D]:T = (x[n,(num_heads+2*H)*D]:T, y[n,num_heads*D]:T, lse[n,num_heads]:f32,"
    " dy[n,num_heads*D]:T, cu_seqlens[b+1]:i32, num_heads:i32, H:i32, D:i32, window:i32, scale:f32)",
    doc="The gradient of self_attention for queries, keys and values, which lie as in x",
    reference=_self_attention_backward,
    cases=_CASES,
    sizes=_sizes,
    inputs=_backward_inputs,
)
