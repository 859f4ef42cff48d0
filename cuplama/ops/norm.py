"""Normalisations. Kernels: cuda_src/norm.cu.

rms_norm: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
layer_norm: Ba, Kiros & Hinton, "Layer Normalization", arXiv:1607.06450.
qk_norm: RMSNorm over each query and key head, as Qwen3 has it; qk_norm_wide: over all of them together, as OLMo 2 has
it (arXiv:2501.00656).
gated_norm: RMSNorm of each head, times silu of a gate, as behind the gated delta rule (arXiv:2412.06464).

offset: what is added to the weights, in float32, before they are multiplied with: 1 for models whose files hold the
difference from 1, as Gemma's do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError

__all__ = [
    "MAX_NORM_ELEMENTS",
    "gated_norm",
    "layer_norm",
    "qk_norm",
    "qk_norm_wide",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_norm",
    "rms_norm_f32",
    "row_launch",
    "wide_parts",
]

_SIZES = ((1, 64), (3, 8), (2, 100), (5, 896), (1, 4096), (2, 5120), (1, 12288))
_CASES = [dict(n=n, d=d, eps=1e-5, offset=i % 2) for i, (n, d) in enumerate(_SIZES)]


def _rms_norm(x: Array, w: Array, *, eps: float, offset: float = 0.0) -> Array:
    x = upcast(x)
    mean_square = np.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1]
    return x / np.sqrt(mean_square + eps) * (offset + upcast(w))


def _rms_norm_add(
    x: Array, w: Array, a: Array, scalar: Array | None = None, *, eps: float, offset: float = 0.0
) -> Array:
    parts = x.reshape(len(x), -1, len(w))
    y = a + _rms_norm(parts, w, eps=eps, offset=offset).reshape(x.shape)
    return y if scalar is None else y * upcast(scalar)


def _rms_norm_add_norm(
    x: Array, post: Array, a: Array, scalar: Array | None, g: Array, *, eps: float, offset: float = 0.0
) -> tuple[Array, Array]:
    total = _rms_norm_add(x, post, a, scalar, eps=eps, offset=offset)
    return _rms_norm(total, g, eps=eps, offset=offset), total


def _layer_norm(x: Array, w: Array, b: Array | None = None, *, eps: float, offset: float = 0.0) -> Array:
    x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * (offset + upcast(w))
    return y if b is None else y + upcast(b)


def _qk_norm(
    x: Array, q_norm: Array, k_norm: Array, *, num_heads: int, num_kv_heads: int, eps: float, offset: float = 0.0,
    v_norm: int = 0,
) -> Array:  # fmt: skip
    y = upcast(x).reshape(len(x), num_heads + 2 * num_kv_heads, len(q_norm)).copy()
    queries, keys, values = np.split(y, (num_heads, num_heads + num_kv_heads), 1)
    queries[:] = _rms_norm(queries, q_norm, eps=eps, offset=offset)
    keys[:] = _rms_norm(keys, k_norm, eps=eps, offset=offset)
    if v_norm:
        values[:] = _rms_norm(values, np.ones_like(q_norm), eps=eps)
    return y.reshape(len(x), -1)


def _qk_norm_wide(
    x: Array, q_norm: Array, k_norm: Array, *, num_heads: int, num_kv_heads: int, eps: float, offset: float = 0.0
) -> Array:
    y = upcast(x).copy()
    for columns, w in wide_parts(q_norm, k_norm):
        y[:, columns] = _rms_norm(y[:, columns], w, eps=eps, offset=offset)
    return y


def _gated_norm(x: Array, w: Array, z: Array, *, eps: float, start: int = 0) -> Array:
    heads, gate = upcast(x).reshape(len(x), -1, len(w)), upcast(z[:, start : start + x.shape[1]])
    with np.errstate(over="ignore"):  # exp(-z) = inf gives the right limit, 0
        return _rms_norm(heads, w, eps=eps).reshape(x.shape) * gate / (1 + np.exp(-gate))


def wide_parts(q_norm: Array, k_norm: Array) -> tuple[tuple[slice, Array], tuple[slice, Array]]:
    """The columns of queries and of keys in a row of ``qk_norm_wide``, each with its weight."""
    q = len(q_norm)
    return (slice(q), q_norm), (slice(q, q + len(k_norm)), k_norm)


_WIDTH = 8  # elements that a thread takes at once, as in the kernels
_MAX_THREADS = 1024  # of a block, which has one row
_MAX_CHUNKS = 2  # times _WIDTH elements that a thread of so large a block holds without spilling registers
MAX_NORM_ELEMENTS = _WIDTH * _MAX_THREADS * _MAX_CHUNKS
"""Elements of a row that the norms over whole rows take on a GPU."""
_BLOCK_HEADS = 4  # heads that a block of qk_norm or gated_norm takes, one for each warp


def _head_sizes(draw: Draw) -> dict[str, Any]:
    return dict(
        n=draw(1, 9), num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=draw(1, 300), eps=1e-6, offset=draw(0, 1)
    )


def _gated_sizes(draw: Draw) -> dict[str, Any]:
    H, V, start = draw(1, 9), draw(1, 300), draw(0, 20)
    return dict(n=draw(1, 9), H=H, V=V, m=start + H * V + draw(0, 20), start=start, eps=1e-5)


def _added_sizes(draw: Draw) -> dict[str, Any]:
    d, offset = draw(1, 9000), draw(0, 1)
    return dict(n=draw(1, 5), m=d * draw(1, 3), d=d, eps=1e-6, offset=offset, scalar=bool(draw(0, 1)))


def row_launch(kernel: str, rows: int, d: int) -> Launch:
    """The launch of a kernel whose blocks have a row of d elements each; OpError if they are too long."""
    vectors = -(-d // _WIDTH)
    threads = min(_MAX_THREADS, -(-vectors // 32) * 32)
    chunks = -(-vectors // threads)
    if d > MAX_NORM_ELEMENTS:
        raise OpError(f"{kernel}: d is {d}; the kernel takes at most {MAX_NORM_ELEMENTS}")
    return Launch(f"norm.cu:{kernel}", (rows,), (threads,), constants={"CHUNKS": chunks})


def _row_kernels(call: Call, device: Device) -> Plan:
    return Plan((row_launch(call.op.name, call["n"], call["d"]),))


def _added_kernels(call: Call, device: Device) -> Plan:
    """One launch, or two where the registers of a block do not hold a row."""
    n, d = call["n"], call["d"]
    if d <= _WIDTH * _MAX_THREADS:
        return _row_kernels(call, device)
    first = replace(row_launch("rms_norm_add", n, d), names={"w": "post", "y": "sum"})
    return Plan((first, replace(row_launch("rms_norm", n, d), names={"x": "sum", "w": "g"})))


def _part_kernels(call: Call, device: Device) -> Plan:
    return Plan((row_launch(call.op.name, call["n"] * call["m"] // call["d"], call["d"]),))


def _wide_kernels(call: Call, device: Device) -> Plan:
    n, d = call["n"], max(call["num_heads"], call["num_kv_heads"]) * call["D"]
    return Plan((replace(row_launch(call.op.name, n, d), grid=(n, 3)),))  # a block for queries, keys, values


def _head_launch(kernel: str, heads: int, D: int) -> Launch:
    constants = {"CHUNKS": -(-D // (32 * _WIDTH))}
    return Launch(f"norm.cu:{kernel}", (-(-heads // _BLOCK_HEADS),), (32 * _BLOCK_HEADS,), constants=constants)


def _qk_kernels(call: Call, device: Device) -> Plan:
    heads = call["n"] * (call["num_heads"] + 2 * call["num_kv_heads"])
    return Plan((_head_launch("qk_norm", heads, call["D"]),))


def _gated_kernels(call: Call, device: Device) -> Plan:
    return Plan((_head_launch("gated_norm", call["n"] * call["H"], call["V"]),))


def _row_gradient(g: Gradient, backward: str, dy: str, *weights: str) -> None:
    """By the op ``backward``, of dy in T, for x and the weights."""
    dx, into = g.fresh("x"), tuple(map(g.into, weights))
    ins = (g["x"], g["w"], dy, *into, g.so_far("x"))
    g.update(backward, (dx, *into), ins, eps=g.attr("eps"), offset=g.attr("offset"))
    g.give("x", dx)


def _rms_gradient(g: Gradient) -> None:
    _row_gradient(g, "rms_norm_backward", g.of("y"), "w")


def _rms_f32_gradient(g: Gradient) -> None:
    _row_gradient(g, "rms_norm_backward", g.rounded("y"), "w")


def _rms_add_gradient(g: Gradient) -> None:
    if g.has("scalar"):
        raise OpError("rms_norm_add: a stored scalar has no gradient yet, so models that have it cannot be trained")
    _row_gradient(g, "rms_norm_backward", g.rounded("y"), "w")
    g.give("a", g.of("y"))


def _layer_gradient(g: Gradient) -> None:
    if g.has("b"):
        _row_gradient(g, "layer_norm_backward", g.of("y"), "w", "b")
    else:
        _row_gradient(g, "layer_norm_no_b_backward", g.of("y"), "w")


def _head_gradient(g: Gradient) -> None:
    if g.attr("v_norm"):
        raise OpError("qk_norm: norms of values have no gradient yet, so models that have them cannot be trained")
    _qk_gradient(g)


def _qk_gradient(g: Gradient) -> None:
    dx, into = g.fresh("x"), (g.into("q_norm"), g.into("k_norm"))
    attrs = {name: g.attr(name) for name in ("num_heads", "num_kv_heads", "eps", "offset")}
    ins = (g["x"], g["q_norm"], g["k_norm"], g.of("y"), *into)
    g.update(f"{g.op}_backward", (dx, *into), ins, **attrs)
    g.give("x", dx)


# Units of float32's rounding. The scale of a row is one number: its error, of a sum of up to 12,288 squares, is a
# factor that all elements of the row have in common, and the judge admits half of the tolerance as such a factor.
_ROW_TOLERANCE = {"f32": 12.0}

rms_norm = Op(
    "rms_norm",
    "y[n,d]:T = (x[n,d]:f32, w[d]:T, eps:f32, offset:f32=0)",
    doc="y = x / sqrt(mean(x^2) + eps) * (offset + w)",
    reference=_rms_norm,
    gradient=_rms_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 9000), eps=1e-6, offset=draw(0, 1)),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 4 * c["n"] * c["d"],
)

rms_norm_f32 = Op(
    "rms_norm_f32",
    "y[n,d]:f32 = (x[n,d]:f32, w[d]:T, eps:f32, offset:f32=0)",
    doc="y = x / sqrt(mean(x^2) + eps) * (offset + w), which is added to another before it is rounded",
    reference=_rms_norm,
    gradient=_rms_f32_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=_CASES,
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 9000), eps=1e-6, offset=draw(0, 1)),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 4 * c["n"] * c["d"],
)

rms_norm_add = Op(
    "rms_norm_add",
    "y[n,m]:f32 = (x[n,m]:f32, w[d]:T, a[n,m]:f32, scalar[1]:T?, eps:f32, offset:f32=0)",
    doc="y = (a + x / sqrt(mean(x^2) + eps) * (offset + w)) * scalar: a norm behind a sublayer, and the residual"
    " stream. Of a row of several times d elements each d are normalised by themselves.",
    reference=_rms_norm_add,
    gradient=_rms_add_gradient,
    kernels=_part_kernels,
    cases=[
        {**case, "m": case["d"] * (3 if i % 3 == 2 else 1), "parts": i % 3 == 2, "scalar": i % 4 == 1}
        for i, case in enumerate(_CASES)
    ],
    sizes=_added_sizes,
    shape={"n": 1, "m": 2304, "d": 2304},
    rules=("m % d == 0",),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 5 * c["n"] * c["m"],
)

rms_norm_add_norm = Op(
    "rms_norm_add_norm",
    "y[n,d]:T, sum[n,d]:f32 = (x[n,d]:f32, post[d]:T, a[n,d]:f32, scalar[1]:T?, g[d]:T, eps:f32, offset:f32=0)",
    doc="sum = (a + rms_norm(x)) * scalar with the scale post, and y = rms_norm(sum) with the scale g: a norm behind a"
    " sublayer, the residual stream, and the norm ahead of the next sublayer. Both take eps and offset.",
    reference=_rms_norm_add_norm,
    kernels=_added_kernels,
    cases=[{**case, "scalar": i % 3 == 1} for i, case in enumerate(_CASES)],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 9000), eps=1e-6, offset=draw(0, 1), scalar=bool(draw(0, 1))),
    shape={"n": 1, "d": 2560},
    tolerance=_ROW_TOLERANCE,
    kernel_docs={
        "rms_norm_add_norm": "A norm behind a sublayer, the residual stream, and the norm ahead of the next sublayer.",
        "rms_norm_add": "The norm behind the sublayer, of rows that are too long for both.",
        "rms_norm": "The norm ahead of the next, of such rows.",
    },
    flops=lambda c: 9 * c["n"] * c["d"],
)

layer_norm = Op(
    "layer_norm",
    "y[n,d]:T = (x[n,d]:f32, w[d]:T, b[d]:T?, eps:f32, offset:f32=0)",
    doc="y = (x - mean(x)) / sqrt(var(x) + eps) * (offset + w) + b",
    reference=_layer_norm,
    gradient=_layer_gradient,
    recompute="cheap",
    kernels=_row_kernels,
    cases=[{**case, "b": i % 3 != 2} for i, case in enumerate(_CASES)],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(2, 9000), eps=1e-5, offset=draw(0, 1), b=bool(draw(0, 1))),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 7 * c["n"] * c["d"],
)

qk_norm = Op(
    "qk_norm",
    "y[n,(num_heads+2*num_kv_heads)*D]:T = (x[n,(num_heads+2*num_kv_heads)*D]:T, q_norm[D]:T, k_norm[D]:T,"
    " num_heads:i32, num_kv_heads:i32, eps:f32, offset:f32=0, v_norm:i32=0)",
    doc="RMSNorm of every query head (weight q_norm) and key head (weight k_norm); value heads are copied, or with"
    " v_norm = 1 normalised without a weight.",
    reference=_qk_norm,
    gradient=_head_gradient,
    recompute="layers",
    kernels=_qk_kernels,
    cases=[
        dict(n=n, num_heads=h, num_kv_heads=k, D=d, eps=1e-6, offset=i % 2, v_norm=i % 3 == 1)
        for i, (n, h, k, d) in enumerate(
            ((1, 4, 2, 64), (3, 1, 1, 8), (5, 3, 1, 80), (2, 32, 8, 128), (1, 2, 2, 256), (3, 4, 0, 512))
        )
    ],
    sizes=lambda draw: {**_head_sizes(draw), "num_kv_heads": draw(0, 4), "v_norm": draw(0, 1)},
    flops=lambda c: 4 * c["n"] * (c["num_heads"] + c["num_kv_heads"]) * c["D"],
)

qk_norm_wide = Op(
    "qk_norm_wide",
    "y[n,(num_heads+2*num_kv_heads)*D]:T = (x[n,(num_heads+2*num_kv_heads)*D]:T, q_norm[num_heads*D]:T,"
    " k_norm[num_kv_heads*D]:T, num_heads:i32, num_kv_heads:i32, eps:f32, offset:f32=0)",
    doc="RMSNorm of all query heads of a row together (weight q_norm), and of all its key heads (weight k_norm); value"
    " heads are copied.",
    reference=_qk_norm_wide,
    gradient=_qk_gradient,
    recompute="layers",
    kernels=_wide_kernels,
    cases=[
        dict(n=n, num_heads=h, num_kv_heads=k, D=d, eps=1e-6, offset=i % 2)
        for i, (n, h, k, d) in enumerate(
            ((1, 4, 2, 64), (3, 1, 1, 8), (5, 3, 1, 20), (2, 40, 8, 128), (1, 65, 65, 128), (2, 1, 4, 33))
        )
    ],
    sizes=_head_sizes,
    shape={"n": 1, "num_heads": 32, "num_kv_heads": 32, "D": 128},
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 4 * c["n"] * (c["num_heads"] + c["num_kv_heads"]) * c["D"],
)

gated_norm = Op(
    "gated_norm",
    "y[n,H*V]:T = (x[n,H*V]:T, w[V]:T, z[n,m]:T, eps:f32, start:i32=0)",
    doc="y = x / sqrt(mean(x^2) + eps) * w * silu(z), the mean over each head, which is V elements of a row;"
    " silu(a) = a / (1 + exp(-a)). The columns of z from start on are those of x.",
    reference=_gated_norm,
    kernels=_gated_kernels,
    cases=[
        dict(n=n, H=h, V=v, m=before + h * v + behind, start=before, eps=1e-6)
        for n, h, v, before, behind in (
            (1, 48, 128, 0, 0),
            (3, 1, 8, 8, 16),
            (2, 3, 33, 1, 0),
            (5, 5, 64, 24, 4),
            (1, 2, 272, 4, 4),
        )
    ],
    sizes=_gated_sizes,
    rules=("start + H * V <= m",),
    shape={"n": 1, "H": 48, "V": 128, "m": 16480, "start": 10240},
    bytes=lambda c: (3 * c["n"] * c["H"] + 1) * c["V"] * c.dtypes["T"].itemsize,
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 9 * c["n"] * c["H"] * c["V"],
)
