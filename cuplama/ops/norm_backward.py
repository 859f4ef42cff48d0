"""Gradients of the normalisations. Kernels: cuda_src/norm_backward.cu.

With xhat = x / s, s = sqrt(mean(x^2) + eps), and h = dy * (offset + w): dx = (h - xhat * mean(h * xhat)) / s, and dw
sums dy * xhat over the rows. For layer_norm x and h lose their means as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..dtypes import Array, upcast
from .launch import Device, Launch, Plan
from .norm import wide_parts
from .op import Call, Draw, Op

__all__ = [
    "layer_norm_backward",
    "layer_norm_no_b_backward",
    "qk_norm_backward",
    "qk_norm_wide_backward",
    "rms_norm_backward",
]

_CASES = [
    dict(n=n, d=d, eps=1e-5, a=a, offset=offset)
    for n, d, a, offset in (
        (1, 64, False, 0),
        (3, 8, True, 1),
        (2, 100, True, 0),
        (5, 896, False, 1),
        (7, 333, True, 0),
        (2, 5120, True, 1),
        (70, 24, False, 0),
        (2, 8200, False, 1),
    )
]


def _mean(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


def _rms_backward(x: Array, w: Array, dy: Array, eps: float, offset: float) -> tuple[Array, Array]:
    """(dx, dy * xhat) of rows [..., d]."""
    x, w, dy = upcast(x), offset + upcast(w), upcast(dy)
    inverse = 1 / (_mean(x * x) + eps) ** 0.5
    xhat, h = x * inverse, dy * w
    return (h - xhat * _mean(h * xhat)) * inverse, dy * xhat


def _rms_norm_backward(
    x: Array, w: Array, dy: Array, dw: Array, a: Array | None = None, *, eps: float, offset: float = 0.0
) -> tuple[Array, Array]:
    dx, scaled = _rms_backward(x, w, dy, eps, offset)
    dw += scaled.sum(0)
    return dx if a is None else dx + a, dw


def _layer_norm_no_b_backward(
    x: Array, w: Array, dy: Array, dw: Array, a: Array | None = None, *, eps: float, offset: float = 0.0
) -> tuple[Array, Array]:
    x, w, dy = upcast(x), offset + upcast(w), upcast(dy)
    x = x - _mean(x)
    inverse = 1 / (_mean(x * x) + eps) ** 0.5
    xhat, h = x * inverse, dy * w
    dx = (h - _mean(h) - xhat * _mean(h * xhat)) * inverse
    dw += (dy * xhat).sum(0)
    return dx if a is None else dx + a, dw


def _layer_norm_backward(
    x: Array, w: Array, dy: Array, dw: Array, db: Array, a: Array | None = None, *, eps: float, offset: float = 0.0
) -> tuple[Array, Array, Array]:
    db += upcast(dy).sum(0)
    return *_layer_norm_no_b_backward(x, w, dy, dw, a, eps=eps, offset=offset), db


def _qk_norm_backward(
    x: Array, q_norm: Array, k_norm: Array, dy: Array, dq_norm: Array, dk_norm: Array,
    *, num_heads: int, num_kv_heads: int, eps: float, offset: float = 0.0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    shape = len(x), num_heads + 2 * num_kv_heads, len(q_norm)
    x, dx = upcast(x).reshape(shape), upcast(dy).reshape(shape).copy()
    for heads, w, dw in (
        (slice(num_heads), q_norm, dq_norm),
        (slice(num_heads, num_heads + num_kv_heads), k_norm, dk_norm),
    ):
        dx[:, heads], scaled = _rms_backward(x[:, heads], w, dx[:, heads], eps, offset)
        dw += scaled.sum((0, 1))
    return dx.reshape(len(x), -1), dq_norm, dk_norm


def _qk_norm_wide_backward(
    x: Array, q_norm: Array, k_norm: Array, dy: Array, dq_norm: Array, dk_norm: Array,
    *, num_heads: int, num_kv_heads: int, eps: float, offset: float = 0.0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    x, dx = upcast(x), upcast(dy).copy()
    for (columns, w), dw in zip(wide_parts(q_norm, k_norm), (dq_norm, dk_norm), strict=True):
        dx[:, columns], scaled = _rms_backward(x[:, columns], w, dx[:, columns], eps, offset)
        dw += scaled.sum(0)
    return dx, dq_norm, dk_norm


_MAX_THREADS = 512  # of a block, which has a row at a time
_WIDTH = 8  # elements of a piece of a row, as in the kernels
_COLUMNS = 32  # of a block that adds up the sums of the others
_MIN_ROWS = 2  # that a block takes if there are more: a row of sums for every row would double the traffic
# Pieces that a thread holds without spilling registers.
_HELD = {"rms_norm_backward": 2, "layer_norm_backward": 1, "qk_norm_wide_backward": 2}
_WIDE_PARTS = 3  # of a row, which have blocks of their own: queries, keys, values
_RESIDENT = 768  # threads that a multiprocessor has registers for; half as many where each holds two pieces
_QK_THREADS = 128  # of a block of qk_norm_backward
_QK_BLOCKS = 7  # of these that a multiprocessor has registers for


def _spread(rows: int, blocks: int) -> int:
    """How many blocks share the rows, ``blocks`` at most, such that the largest share is as small as it can be."""
    return -(-rows // max(_MIN_ROWS, -(-rows // blocks)))


def _added(kernel: str, sums: int, blocks: int, size: int) -> Launch:
    """The launch that adds up what the blocks have of each of the sums."""
    grid = (-(-size // _COLUMNS), sums)
    return Launch(f"norm_backward.cu:{kernel}_sums", grid, (1024,), constants={"blocks": blocks})


def _rms_kernels(call: Call, device: Device) -> Plan:
    return _row_plan(call, device, "rms_norm_backward", 1)


def _layer_kernels(call: Call, device: Device) -> Plan:
    return _row_plan(call, device, "layer_norm_backward", 2)


def _row_plan(call: Call, device: Device, name: str, sums: int) -> Plan:
    """sums: that the kernel leaves, of which the op may want the first alone."""
    d, wanted = call["d"], len(call.op.signature.in_place)
    rows = _row_launch(name, call["n"], d, device)
    (blocks,) = rows.grid
    added = _added("rms_norm_backward" if wanted == 1 else name, wanted, blocks, d)
    return Plan((rows, added), {"partial": ((sums, blocks, d), "f32")})


def _wide_kernels(call: Call, device: Device) -> Plan:
    D, heads, kv_heads = call["D"], call["num_heads"], call["num_kv_heads"]
    d = max(heads, kv_heads) * D
    rows = _row_launch("qk_norm_wide_backward", call["n"], d, device)
    (blocks,) = rows.grid
    added = _added("qk_norm_wide_backward", 2, blocks, d)
    scratch = {"partial": ((blocks, (heads + kv_heads) * D), "f32")}
    return Plan((replace(rows, grid=(blocks, _WIDE_PARTS)), added), scratch)


def _row_launch(name: str, n: int, d: int, device: Device) -> Launch:
    """The launch that goes through n rows of d elements."""
    pieces = -(-d // (_WIDTH * _MAX_THREADS))
    held = pieces if pieces <= _HELD[name] else 0
    threads = -(-d // (_WIDTH * (held or pieces) * 32)) * 32
    blocks = _spread(n, device.sms * max(1, _RESIDENT // threads // max(1, held)))
    return Launch(f"norm_backward.cu:{name}", (blocks,), (threads,), constants={"HELD": held})


def _qk_kernels(call: Call, device: Device) -> Plan:
    D, heads = call["D"], call["n"] * (call["num_heads"] + 2 * call["num_kv_heads"])
    lanes = next((lanes for lanes in (8, 16) if lanes * _WIDTH >= D), 32)  # that have a head
    at_once = _QK_THREADS // lanes
    blocks = _spread(-(-heads // at_once), device.sms * _QK_BLOCKS)
    constants = {"LANES": lanes, "CHUNKS": -(-D // (lanes * _WIDTH))}
    rows = Launch("norm_backward.cu:qk_norm_backward", (blocks,), (_QK_THREADS,), constants=constants)
    return Plan((rows, _added("qk_norm_backward", 2, blocks, D)), {"partial": ((2, blocks, D), "f32")})


# Units of float32's rounding. A block adds up its rows one by one, then the blocks' sums are added up: of 65,536 rows
# they are off by up to 6. The scale of a row is a factor that its elements have in common, as in the forward ops.
_TOLERANCE = {"f32": 12.0}
_SMALLEST = 16  # Of a row of a few elements dx is a small difference of large numbers.


def _row_sizes(draw: Draw) -> dict[str, Any]:
    return dict(n=draw(1, 9), d=draw(_SMALLEST, 3000), eps=1e-5, a=bool(draw(0, 1)), offset=draw(0, 1))


rms_norm_backward = Op(
    "rms_norm_backward",
    "dx[n,d]:f32, dw[d]:f32 = (x[n,d]:f32, w[d]:T, dy[n,d]:T, dw[d]:f32, a[n,d]:f32?, eps:f32, offset:f32=0)",
    doc="The gradient of rms_norm: dx, plus a where it is given; what w's gradient grows by is added to dw.",
    reference=_rms_norm_backward,
    kernels=_rms_kernels,
    kernel_docs={
        "rms_norm_backward": "The gradient dx, and for each block what dw grows by.",
        "rms_norm_backward_sums": "Adds to dw what the blocks have, in a fixed order.",
    },
    cases=_CASES,
    sizes=_row_sizes,
    tolerance=_TOLERANCE,
    flops=lambda c: 13 * c["n"] * c["d"],
)

layer_norm_backward = Op(
    "layer_norm_backward",
    "dx[n,d]:f32, dw[d]:f32, db[d]:f32 = (x[n,d]:f32, w[d]:T, dy[n,d]:T, dw[d]:f32, db[d]:f32, a[n,d]:f32?, eps:f32,"
    " offset:f32=0)",
    doc="The gradient of layer_norm: dx, plus a where it is given; those of w and b are added to dw and db.",
    reference=_layer_norm_backward,
    kernels=_layer_kernels,
    kernel_docs={
        "layer_norm_backward": "The gradient dx, and for each block what dw and db grow by.",
        "layer_norm_backward_sums": "Adds to dw and db what the blocks have, in a fixed order.",
    },
    cases=_CASES[:-1],  # Rows of more than 4,096 elements are not held, so 5,120 will do.
    sizes=_row_sizes,
    tolerance=_TOLERANCE,
    flops=lambda c: 17 * c["n"] * c["d"],
)

layer_norm_no_b_backward = Op(
    "layer_norm_no_b_backward",
    "dx[n,d]:f32, dw[d]:f32 = (x[n,d]:f32, w[d]:T, dy[n,d]:T, dw[d]:f32, a[n,d]:f32?, eps:f32, offset:f32=0)",
    doc="The gradient of layer_norm without b: dx, plus a where it is given; that of w is added to dw.",
    reference=_layer_norm_no_b_backward,
    kernels=_layer_kernels,
    kernel_docs={
        "layer_norm_backward": "The gradient dx, and for each block what dw grows by.",
        "rms_norm_backward_sums": "Adds to dw what the blocks have, in a fixed order.",
    },
    cases=_CASES[:3],  # The kernels are those of layer_norm_backward and rms_norm_backward.
    sizes=_row_sizes,
    tolerance=_TOLERANCE,
    flops=lambda c: 17 * c["n"] * c["d"],
)

qk_norm_backward = Op(
    "qk_norm_backward",
    "dx[n,(num_heads+2*num_kv_heads)*D]:T, dq_norm[D]:f32, dk_norm[D]:f32 = (x[n,(num_heads+2*num_kv_heads)*D]:T,"
    " q_norm[D]:T, k_norm[D]:T, dy[n,(num_heads+2*num_kv_heads)*D]:T, dq_norm[D]:f32, dk_norm[D]:f32,"
    " num_heads:i32, num_kv_heads:i32, eps:f32, offset:f32=0)",
    doc="The gradient of qk_norm; those of its weights are added to dq_norm and dk_norm.",
    reference=_qk_norm_backward,
    kernels=_qk_kernels,
    kernel_docs={
        "qk_norm_backward": "The gradient dx, and for each block what dq_norm and dk_norm grow by.",
        "qk_norm_backward_sums": "Adds to dq_norm and dk_norm what the blocks have, in a fixed order.",
    },
    cases=[
        dict(n=n, num_heads=h, num_kv_heads=k, D=d, eps=1e-6, offset=i % 2)
        for i, (n, h, k, d) in enumerate(
            ((1, 4, 2, 64), (3, 1, 1, 8), (5, 3, 1, 80), (2, 32, 8, 128), (1, 2, 2, 256), (9, 5, 1, 260))
        )
    ],
    sizes=lambda draw: dict(
        n=draw(1, 9), num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=draw(_SMALLEST, 300), eps=1e-6, offset=draw(0, 1)
    ),
    tolerance=_TOLERANCE,
    flops=lambda c: 12 * c["n"] * (c["num_heads"] + c["num_kv_heads"]) * c["D"],
)

qk_norm_wide_backward = Op(
    "qk_norm_wide_backward",
    "dx[n,(num_heads+2*num_kv_heads)*D]:T, dq_norm[num_heads*D]:f32, dk_norm[num_kv_heads*D]:f32 ="
    " (x[n,(num_heads+2*num_kv_heads)*D]:T, q_norm[num_heads*D]:T, k_norm[num_kv_heads*D]:T,"
    " dy[n,(num_heads+2*num_kv_heads)*D]:T, dq_norm[num_heads*D]:f32, dk_norm[num_kv_heads*D]:f32,"
    " num_heads:i32, num_kv_heads:i32, eps:f32, offset:f32=0)",
    doc="The gradient of qk_norm_wide; those of its weights are added to dq_norm and dk_norm.",
    reference=_qk_norm_wide_backward,
    kernels=_wide_kernels,
    kernel_docs={
        "qk_norm_wide_backward": "The gradient dx, and for each block what dq_norm and dk_norm grow by.",
        "qk_norm_wide_backward_sums": "Adds to dq_norm and dk_norm what the blocks have, in a fixed order.",
    },
    cases=[
        dict(n=n, num_heads=h, num_kv_heads=k, D=d, eps=1e-6, offset=i % 2)
        for i, (n, h, k, d) in enumerate(
            ((1, 4, 2, 64), (3, 2, 2, 8), (9, 3, 1, 20), (5, 40, 8, 128), (2, 65, 4, 128), (2, 1, 4, 33))
        )
    ],
    sizes=lambda draw: dict(
        n=draw(1, 9), num_heads=draw(1, 9), num_kv_heads=draw(1, 4), D=draw(_SMALLEST, 300), eps=1e-6, offset=draw(0, 1)
    ),
    shape={"n": 512, "num_heads": 32, "num_kv_heads": 32, "D": 128},
    tolerance=_TOLERANCE,
    flops=lambda c: 12 * c["n"] * (c["num_heads"] + c["num_kv_heads"]) * c["D"],
)
