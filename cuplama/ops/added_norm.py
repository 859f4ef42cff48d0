"""A norm behind a sublayer, the residual stream, and the norm and product that read it next, as one op.

Kernels: cuda_src/linear.cu and linear_mma.cu. Defined by its parts, ``rms_norm_add`` and the op that fuses a norm with
a product (``fused.py``): the references only call theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..dtypes import Array, dtype_name
from .fused import rms_norm_linear, rms_norm_linear_gelu_tanh_mul, rms_norm_linear_silu_mul
from .launch import Device, Launch, Plan
from .linear import MAX_STREAMED_ROWS, PRODUCT_TOLERANCE, Prologue, stream_rows
from .linear_packed import halves_of
from .norm import rms_norm_add, row_launch
from .op import Call, Draw, Op
from .weights import segments_of

__all__ = [
    "MAX_ADDED_ROWS",
    "rms_norm_add_norm_linear",
    "rms_norm_add_norm_linear_gelu_tanh_mul",
    "rms_norm_add_norm_linear_silu_mul",
]

MAX_ADDED_ROWS = MAX_STREAMED_ROWS
"""Rows of x up to which every block of a product computes both norms itself. For more, and for packed weights, the
first norm is a launch of its own."""

_SHAPES = (
    (1, 64, 64, False), (1, 14, 8, True), (2, 34, 72, True), (3, 66, 1024, False), (5, 17, 136, True),
    (8, 96, 896, True),
)  # fmt: skip


def _constants(call: Call, act: str) -> dict[str, str]:
    """Those of the kernels. act: the activation behind the product, or none."""
    return {"ACT": act.upper() or "NO_ACT", "U": dtype_name(call.dtypes["T" if act else "U"])}


def _own_norm(call: Call) -> Launch:
    """The first norm as a launch of its own, which writes the residual stream."""
    launch = row_launch("rms_norm_add", call["n"], call["k"])
    return replace(launch, constants={**launch.constants, "d": call["k"]}, names={"w": "post", "y": "sum"})


def _kernels(call: Call, device: Device, act: str) -> Plan:
    k, size, constants = call["k"], call.dtypes["T"].itemsize, _constants(call, act)
    element = call.dtypes["T" if act else "U"].itemsize
    # Rows for the product; in f32 x and the residual stream, which becomes their sum; once the scale of the first norm.
    both = Prologue(k * (element + 2 * 4), k * size)
    fused = call["n"] <= MAX_ADDED_ROWS and not device.deterministic and segments_of(call.arrays["w"]) is None
    if fused and both.rows(call, device, halves_of(constants)):
        return stream_rows("rms_norm_add_norm_linear", call, device, prologue=both, **constants)
    plan = stream_rows("rms_norm_linear", call, device, prologue=Prologue(k * element), **constants)
    behind = tuple(replace(launch, names={"x": "sum", **launch.names}) for launch in plan.launches)
    return replace(plan, launches=(_own_norm(call), *behind))


def _sizes(draw: Draw) -> Mapping[str, Any]:
    given = dict(n=draw(1, 8), m=draw(1, 70), k=draw(1, 40) * draw(1, 40), b=bool(draw(0, 1)), eps=1e-6)
    return {**given, "U": ("T", "f32")[draw(0, 1)], "scalar": bool(draw(0, 1)), "offset": draw(0, 1)}


def _added(product: Op, act: str, **tolerance: float) -> Op:
    """rms_norm_add -> product, where that begins with a norm, as one op. tolerance: by output dtype, where it is not
    what such ops have."""
    rows = 2 if act else 1

    def reference(
        x: Array, post: Array, a: Array, scalar: Array | None, g: Array, *weights: Array | None,
        eps: float, offset: float = 0.0, **dtype: str,
    ) -> tuple[Array, Array]:  # fmt: skip
        total = rms_norm_add.reference(x, post, a, scalar, eps=eps, offset=offset)
        return product.reference(total, g, *weights, eps=eps, offset=offset, **dtype), total

    out, width = ("y[n,m]:T", "2*m") if act else ("y[n,m]:U", "m")
    free = {} if act else {"U": "T"}
    both = "act(rms_norm(sum) w^T + b), with sum = (a + rms_norm(x)) * scalar,"
    return Op(
        f"rms_norm_add_norm_linear{'_' * bool(act)}{act}",
        f"{out}, sum[n,k]:f32 = (x[n,k]:f32, post[k]:T, a[n,k]:f32, scalar[1]:T?, g[k]:T, w[{width},k]:W,"
        f" b[{width}]:T?, eps:f32, offset:f32=0)",
        doc="sum = (a + rms_norm(x)) * scalar, with the scale post: a norm behind a sublayer, and the residual stream;"
        f" y = {f'{act}(' if act else ''}rms_norm(sum) w^T + b{')' * bool(act)}, with the scale g",
        reference=reference,
        kernels=lambda call, device: _kernels(call, device, act),
        cases=[
            *(
                dict(n=n, m=m, k=k, b=b, eps=1e-5, offset=i % 2, scalar=i % 3 == 1, **free)
                for i, (n, m, k, b) in enumerate(_SHAPES)
            ),
            *(
                dict(n=n, m=10, k=k, b=True, eps=1e-5, scalar=True, U="f32")
                for n, k in ((1, 27), (2, 40))
                if not act
            ),
            dict(n=1, m=32, k=200, b=True, eps=1e-5, W="int4 g128", scalar=True, **free),
            dict(n=9, m=24, k=104, b=False, eps=1e-5, offset=1, scalar=False, **free),
        ],
        sizes=_sizes,
        shape={"n": 1, "m": 10240, "k": 2560},
        # As such a product has; the roundings of the sum to f32 are small beside those.
        tolerance={**PRODUCT_TOLERANCE, "f16": 1.5, "bf16": 1.25, **tolerance},
        flops=lambda c: 2 * rows * c["n"] * c["m"] * c["k"],
        kernel_docs={
            **product.kernel_docs,
            "rms_norm_add_norm_linear": f"{both} for up to 8 rows of x, by multiply-adds",
            "rms_norm_add_norm_linear_mma": f"{both} for two to eight rows of x, on tensor cores",
            "rms_norm_add": rms_norm_add.doc,
        },
    )  # fmt: skip


rms_norm_add_norm_linear = _added(rms_norm_linear, "")
rms_norm_add_norm_linear_silu_mul = _added(rms_norm_linear_silu_mul, "silu_mul", bf16=1.75)
rms_norm_add_norm_linear_gelu_tanh_mul = _added(rms_norm_linear_gelu_tanh_mul, "gelu_tanh_mul", bf16=1.75)
