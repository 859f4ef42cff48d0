"""A norm behind a sublayer, the residual stream, and the product that reads it next, through a norm or as it is, as one
op.

Kernels: cuda_src/linear.cu and linear_mma.cu. Defined by its parts, ``rms_norm_add`` and the product, ``linear`` or one
that is fused with a norm (``fused.py``): the references only call theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..dtypes import DTYPES, Array, dtype_name
from .fused import rms_norm_linear, rms_norm_linear_gelu_tanh_mul, rms_norm_linear_silu_mul
from .launch import Device, Plan
from .linear import MAX_STREAMED_ROWS, PRODUCT_TOLERANCE, Prologue, linear, one_phase, stream_rows
from .linear_packed import halves_of
from .norm import rms_norm_add, row_launch
from .op import Call, Draw, Op
from .residual import cast, cast_launch
from .weights import segments_of

__all__ = [
    "MAX_ADDED_BYTES",
    "rms_norm_add_linear",
    "rms_norm_add_norm_linear",
    "rms_norm_add_norm_linear_gelu_tanh_mul",
    "rms_norm_add_norm_linear_silu_mul",
]

MAX_ADDED_BYTES = 64 << 10
"""Bytes that a block of a product reads for the norm behind a sublayer, beside what it reads without, at most. For
more, and for packed weights, that norm is a launch of its own. An estimate: the blocks of an H200 read 64 KB each from
L2 in 1.5 microseconds, and the launch takes 3."""

_SHAPES = (
    (1, 64, 64, False), (1, 14, 8, True), (2, 34, 72, True), (3, 66, 1024, False), (5, 17, 136, True),
    (8, 96, 896, True),
)  # fmt: skip
_CAST = "rounded"  # scratch: the residual stream in T, where a launch makes it


def _constants(call: Call, act: str) -> dict[str, str]:
    """Those of the kernels. act: the activation behind the product, or none."""
    return {"ACT": act.upper() or "NO_ACT", "U": dtype_name(call.dtypes["T" if act else "U"])}


def _added_bytes(call: Call, constants: Mapping[str, str]) -> int:
    """What ``MAX_ADDED_BYTES`` bounds. Several rows are read again wherever they are needed if they do not fit into
    registers: where k is long, or an element becomes two numbers, for a result in f32."""
    n, k = call["n"], call["k"]
    again = n > 1 and (constants["U"] == "f32" or not one_phase(k))
    return int(n * k * 4 * (3 if again else 1))


def _kernels(call: Call, device: Device, act: str) -> Plan:
    n, k, T, constants = call["n"], call["k"], dtype_name(call.dtypes["T"]), _constants(call, act)
    element, normed = DTYPES[constants["U"]].itemsize, "g" in call.arrays
    # Rows for the product; in f32 x and the residual stream, which becomes their sum; once the scale of the first norm.
    both = Prologue(k * (element + 2 * 4), k * DTYPES[T].itemsize)
    few = n <= MAX_STREAMED_ROWS and _added_bytes(call, constants) <= MAX_ADDED_BYTES
    fused = few and not device.deterministic and segments_of(call.arrays["w"]) is None
    if fused and both.rows(call, device, halves_of(constants)):
        own = {"NORM": "ADDED_NORM"} if normed else {"NORM": "ADDED", "g": None}
        return stream_rows("rms_norm_add_linear", call, device, prologue=both, **own, **constants)
    norm = row_launch("rms_norm_add", n, k)
    first = [replace(norm, constants={**norm.constants, "d": k}, names={"w": "post", "y": "sum"})]
    if normed:
        plan, x = stream_rows("rms_norm_linear", call, device, prologue=Prologue(k * element), **constants), "sum"
    else:
        plan, x = stream_rows("linear", call, device), _CAST
        plan = replace(plan, scratch={**plan.scratch, _CAST: ((n, k), T)})
        launch = cast_launch("cast", n, k)
        first.append(replace(launch, constants={"U": T, "d": k}, names={"x": "sum", "y": _CAST}))
    behind = (replace(launch, names={"x": x, **launch.names}) for launch in plan.launches)
    return replace(plan, launches=(*first, *behind))


def _sizes(draw: Draw) -> Mapping[str, Any]:
    given = dict(n=draw(1, 8), m=draw(1, 70), k=draw(1, 40) * draw(1, 40), b=bool(draw(0, 1)), eps=1e-6)
    return {**given, "U": ("T", "f32")[draw(0, 1)], "scalar": bool(draw(0, 1)), "offset": draw(0, 1)}


def _cases(**free: str) -> list[Mapping[str, Any]]:
    """free: the dtype of y where the op lets it be chosen."""
    found: list[Mapping[str, Any]] = [
        dict(n=n, m=m, k=k, b=b, eps=1e-5, offset=i % 2, scalar=i % 3 == 1, **free)
        for i, (n, m, k, b) in enumerate(_SHAPES)
    ]
    logits = (dict(n=n, m=10, k=k, b=True, eps=1e-5, scalar=True, U="f32") for n, k in ((1, 27), (2, 40)))
    own = (
        dict(n=1, m=32, k=200, b=True, eps=1e-5, W="int4 g128", scalar=True, **free),
        dict(n=9, m=24, k=104, b=False, eps=1e-5, offset=1, scalar=False, **free),
    )
    return [*found, *(logits if free else ()), *own]


def _added(name: str, product: Op, act: str = "", **tolerance: float) -> Op:
    """rms_norm_add -> product, as one op. act: the product's activation, or none; tolerance: by output dtype, where it
    is not what such ops have."""
    normed, rows = "norm" in product.name, 2 if act else 1

    def reference(
        x: Array, post: Array, a: Array, scalar: Array | None, *weights: Array | None,
        eps: float, offset: float = 0.0, **dtype: str,
    ) -> tuple[Array, Array]:  # fmt: skip
        total = rms_norm_add.reference(x, post, a, scalar, eps=eps, offset=offset)
        norm = {"eps": eps, "offset": offset} if normed else {}
        return product.reference(total, *weights, **norm, **dtype), total

    out, width = ("y[n,m]:T", "2*m") if act else ("y[n,m]:U", "m")
    scale = " g[k]:T," if normed else ""
    of_sum = "rms_norm(sum) w^T + b" if normed else "sum w^T + b"
    both = "y = act(rms_norm(sum) w^T + b) or sum w^T + b with sum = (a + rms_norm(x)) * scalar"
    return Op(
        name,
        f"{out}, sum[n,k]:f32 = (x[n,k]:f32, post[k]:T, a[n,k]:f32, scalar[1]:T?,{scale} w[{width},k]:W,"
        f" b[{width}]:T?, eps:f32, offset:f32=0)",
        doc="sum = (a + rms_norm(x)) * scalar, with the scale post: a norm behind a sublayer, and the residual stream;"
        f" y = {f'{act}({of_sum})' if act else of_sum}{', with the scale g' * normed}",
        reference=reference,
        kernels=lambda call, device: _kernels(call, device, act),
        cases=_cases(**({} if act else {"U": "T"})),
        sizes=_sizes,
        shape={"n": 1, "m": 10240, "k": 2560},
        # As such a product has; the roundings of the sum to f32 are small beside those.
        tolerance={**PRODUCT_TOLERANCE, "f16": 1.5, "bf16": 1.25, **tolerance},
        flops=lambda c: 2 * rows * c["n"] * c["m"] * c["k"],
        kernel_docs={
            **product.kernel_docs,
            "rms_norm_add_linear": f"{both}, for up to 8 rows of x, by multiply-adds",
            "rms_norm_add_linear_mma": f"{both}, for two to eight rows of x, on tensor cores",
            "rms_norm_add": rms_norm_add.doc,
            "cast": cast.doc,
        },
    )


rms_norm_add_linear = _added("rms_norm_add_linear", linear)
rms_norm_add_norm_linear = _added("rms_norm_add_norm_linear", rms_norm_linear)
rms_norm_add_norm_linear_silu_mul = _added(
    "rms_norm_add_norm_linear_silu_mul", rms_norm_linear_silu_mul, "silu_mul", bf16=1.75
)
rms_norm_add_norm_linear_gelu_tanh_mul = _added(
    "rms_norm_add_norm_linear_gelu_tanh_mul", rms_norm_linear_gelu_tanh_mul, "gelu_tanh_mul", bf16=1.75
)
