"""Fused ops: what cuplama/models/fusion.py puts in place of several nodes. Kernels:
cuda_src/linear.cu and linear_mma.cu (weights streamed once, with the norm before and the activation or residual after),
attention_decode.cu.

A fused op is defined by its parts: the references below do nothing but call theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name
from . import activation, norm, residual
from .attention import attention, decode_plan
from .attention_cases import DEFAULT_SIZES, attention_case, equal_sequences, random_sequences, well_known
from .kv_cache import kv_append
from .launch import Device, Launch, Plan
from .linear import PRODUCT_TOLERANCE, Prologue, linear, product_sizes, stream_rows
from .linear_packed_many import many_rows_docs
from .matmul import Matmul
from .norm import qk_norm
from .op import Call, Draw, Op
from .rope import random_rotations, rope
from .signature import OpError

__all__ = [
    "append_attention",
    "gelu_tanh_mul_linear_add",
    "layer_norm_linear",
    "layer_norm_linear_gelu_erf",
    "layer_norm_linear_gelu_tanh",
    "linear_add",
    "rms_norm_linear",
    "rms_norm_linear_gelu_tanh_mul",
    "rms_norm_linear_silu_mul",
    "silu_mul_linear_add",
]


def _inner(op: Op, width: str, names: Mapping[str, str]) -> Callable[[Call], Launch]:
    """``Op.inner``: the op's own launch. width: its size that is the product's k; names: of its parameters, where the
    fused op has others."""

    def inner(call: Call) -> Launch:
        assert op.kernels is not None
        sized = replace(call, op=op, env={**call.env, width: call["k"]})
        (launch,) = op.kernels(sized, Device()).launches
        constants = {**launch.constants, width: call["k"]}
        return replace(launch, constants=constants, names={**names, "y": "inner"})

    return inner


_NORMS = {"rms_norm": (norm.rms_norm, ("g",)), "layer_norm": (norm.layer_norm, ("g", "h"))}
_ACTIVATIONS = {"silu_mul": 2, "gelu_tanh_mul": 2, "gelu_tanh": 1, "gelu_erf": 1}  # rows of w per output

_SHAPES = ((1, 64, 64, False), (1, 14, 8, True), (2, 34, 72, True), (3, 66, 1024, False), (8, 96, 896, True))


_PACKED = ((1, "int4 g128"), (4, "Q4_K"))  # rows of x, format of the weight


def _sizes(draw: Draw) -> dict[str, Any]:
    return {**product_sizes(draw), "n": draw(1, 8)}


def _varied(i: int, scales: Sequence[str]) -> dict[str, Any]:
    """What else the i-th case of an op with a norm has: an offset of its weights, a shift or none."""
    return {"offset": i % 2, **({"h": i % 4 < 2} if "h" in scales else {})}


def _norm_linear(norm_op: Op, act: Op | None, **tolerance: float) -> Op:
    """norm -> linear -> activation, as one op. tolerance: by output dtype, where it is not what such ops have."""
    _, scales = _NORMS[norm_op.name]
    rows = _ACTIVATIONS[act.name] if act else 1

    def reference(x: Array, *weights: Array, eps: float, offset: float = 0.0, U: str = "") -> Array:
        scale, (w, *b) = weights[: len(scales)], weights[len(scales) :]
        y = linear.reference(norm_op.reference(x, *scale, eps=eps, offset=offset), w, *b)
        return act.reference(y) if act else y

    def kernels(call: Call, device: Device) -> Plan:
        U = call.dtypes["T" if act else "U"]
        constants = {"ACT": act.name.upper() if act else "NO_ACT", "U": dtype_name(U)}
        return stream_rows(
            f"{norm_op.name}_linear", call, device, prologue=Prologue(call["k"] * U.itemsize), **constants
        )

    out = "y[n,m]:T" if act else "y[n,m]:U"
    width = "2*m" if rows == 2 else "m"
    formula = f"y = act({norm_op.name}(x) w^T + b)"  # what a kernel computes, which serves several activations
    vectors = ", ".join(f"{s}[k]:T{'?' if s == 'h' else ''}" for s in scales)
    return Op(
        f"{norm_op.name}_linear_{act.name}" if act else f"{norm_op.name}_linear",
        f"{out} = (x[n,k]:f32, {vectors}, w[{width},k]:W, b[{width}]:T?, eps:f32, offset:f32=0)",
        doc=f"y = {f'{act.name}(' if act else ''}{norm_op.name}(x) w^T + b{')' if act else ''}",
        reference=reference,
        kernels=kernels,
        cases=[
            *(
                dict(n=n, m=m, k=k, b=b, eps=1e-5, **({} if act else {"U": "T"}), **_varied(i, scales))
                for i, (n, m, k, b) in enumerate(_SHAPES)
            ),
            *([] if act else [dict(n=2, m=10, k=k, b=True, eps=1e-5, U="f32") for k in (27, 40)]),
            *(
                dict(n=n, m=32, k=200, b=True, eps=1e-5, W=W, **({} if act else {"U": "T"}), **_varied(i, scales))
                for i, (n, W) in enumerate(_PACKED)
            ),
        ],
        sizes=_sizes,
        shape={"n": 1, "m": 3072, "k": 768},
        # Two more roundings than a product has: of the normalised x, and of what the activation takes.
        tolerance={**PRODUCT_TOLERANCE, "f16": 1.5, "bf16": 1.25, **tolerance},
        flops=lambda c: 2 * rows * c["n"] * c["m"] * c["k"],
        matmul=Matmul() if norm_op is norm.rms_norm and act is None else None,
        inner=_inner(norm_op, "d", {"w": "g"}) if norm_op is norm.rms_norm and act is None else None,
        kernel_docs={
            f"{norm_op.name}_linear": f"{formula} for up to 8 rows of x, by multiply-adds",
            f"{norm_op.name}_linear_mma": f"{formula} for two to eight rows of x, on tensor cores",
            f"{norm_op.name}_linear_packed": f"{formula} for up to 8 rows of x and a packed weight",
            norm_op.name: norm_op.doc,
            "linear_packed": linear.kernel_docs["linear_packed"],
        },
    )


rms_norm_linear = _norm_linear(norm.rms_norm, None)
rms_norm_linear_silu_mul = _norm_linear(norm.rms_norm, activation.silu_mul, bf16=1.75)
rms_norm_linear_gelu_tanh_mul = _norm_linear(norm.rms_norm, activation.gelu_tanh_mul, bf16=1.75)
layer_norm_linear = _norm_linear(norm.layer_norm, None)
layer_norm_linear_gelu_tanh = _norm_linear(norm.layer_norm, activation.gelu_tanh, f16=3.0)
layer_norm_linear_gelu_erf = replace(
    _norm_linear(norm.layer_norm, activation.gelu_erf),
    admitted_spills={
        "layer_norm_linear@75": (
            12,
            "one instance (f32, 8 rows, the exact GELU), beside the 128 registers that 512 threads can have;"
            " no other architecture spills there",
        ),
    },
)


def _linear_add_kernels(call: Call, device: Device) -> Plan:
    return stream_rows("linear_add", call, device)


def _linear_add(x: Array, w: Array, a: Array, b: Array | None = None) -> Array:
    return residual.add.reference(a, linear.reference(x, w, b))


linear_add = Op(
    "linear_add",
    "y[n,m]:f32 = (x[n,k]:T, w[m,k]:W, a[n,m]:f32, b[m]:T?)",
    doc="y = a + x w^T + b",
    reference=_linear_add,
    kernels=_linear_add_kernels,
    cases=[dict(n=n, m=m, k=k, b=b) for n, m, k, b in _SHAPES]
    + [
        dict(n=n, m=40, k=k, b=True, W=W)
        for n, k, W in ((1, 328, "fp8"), (16, 256, "Q4_K"), (40, 256, "int4 g128 zero"))
    ],
    sizes=_sizes,
    tolerance=PRODUCT_TOLERANCE,
    flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
    matmul=Matmul(),
    kernel_docs={
        "linear_add": "y = a + x w^T + b for up to 8 rows of x, by multiply-adds",
        "linear_add_mma": "y = a + x w^T + b for two to eight rows of x, on tensor cores",
        "linear_add_packed": "y = a + x w^T + b for up to 8 rows of x and a packed weight",
        **many_rows_docs("linear_add", "y = a + x w^T + b"),
        "gather_columns": linear.kernel_docs["gather_columns"],
    },
)


def _gated_linear_add(act: Op) -> Op:
    """gated activation -> linear -> add, as one op."""

    def reference(x: Array, w: Array, a: Array, b: Array | None = None) -> Array:
        return linear_add.reference(act.reference(x), w, a, b)

    activated = _inner(act, "f", {})

    def kernels(call: Call, device: Device) -> Plan:
        plan = stream_rows("linear_add", call, device)
        products = tuple(replace(launch, names={"x": "inner", **launch.names}) for launch in plan.launches)
        scratch = {**plan.scratch, "inner": ((call["n"], call["k"]), dtype_name(call.dtypes["T"]))}
        return replace(plan, launches=(activated(call), *products), scratch=scratch)

    return Op(
        f"{act.name}_linear_add",
        "y[n,m]:f32 = (x[n,2*k]:T, w[m,k]:W, a[n,m]:f32, b[m]:T?)",
        doc=f"y = a + {act.name}(x) w^T + b",
        reference=reference,
        kernels=kernels,
        cases=[dict(n=n, m=m, k=k, b=b) for n, m, k, b in _SHAPES]
        + [dict(n=n, m=33, k=136, b=True, W="fp8 ordered") for n in (3, 16)],
        sizes=_sizes,
        shape={"n": 512, "m": 4096, "k": 14336},
        # Beside the product's, the rounding of what the activation gives.
        tolerance={**PRODUCT_TOLERANCE, "f16:f32": 5000.0, "bf16:f32": 40000.0},
        flops=lambda c: 2 * c["n"] * c["m"] * c["k"],
        matmul=Matmul(),
        inner=activated,
        kernel_docs={
            act.name: f"{act.name}(x), which the product then takes",
            **linear_add.kernel_docs,
        },
    )


silu_mul_linear_add = _gated_linear_add(activation.silu_mul)
gelu_tanh_mul_linear_add = _gated_linear_add(activation.gelu_tanh_mul)


def _append_attention(
    x: Array,
    slot_mapping: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    seq_lens: Array,
    page_table: Array,
    rope_rows: Array | None = None,
    cos: Array | None = None,
    sin: Array | None = None,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    sinks: Array | None = None,
    *,
    num_heads: int,
    window: int,
    scale: float,
    eps: float,
    offset: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Array, Array, Array]:
    shape = {"num_heads": num_heads, "num_kv_heads": k.shape[1]}
    if q_norm is not None:
        x = qk_norm.reference(x, q_norm, k_norm, **shape, eps=eps, offset=offset)
    if cos is not None:
        x = rope.reference(x, rope_rows, cos, sin, **shape, D=k.shape[3])
    k, v = kv_append.reference(x, slot_mapping, k, v)
    attrs = {"num_heads": num_heads, "window": window, "scale": scale, "softcap": softcap}
    y = attention.reference(x, k, v, cu_seqlens, seq_lens, page_table, sinks, **attrs)
    return y, k, v


def _append_kernels(call: Call, device: Device) -> Plan:
    if call["n"] != call["b"]:
        raise OpError(f"append_attention: {call['n']} new tokens of {call['b']} sequences, which have one each")
    h = call.env.get("h", 0)
    if 2 * h > call["D"]:
        raise OpError(f"append_attention: {h} pairs are rotated, and a head of {call['D']} has {call['D'] // 2}")
    return decode_plan("append_attention", call, device, h=h)


def _append_inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    """The attention op's pages; each sequence's new token goes to the slot that its length says, which holds NaN."""
    assert attention.inputs is not None
    given = attention.inputs(rng, case, T)
    last = given["seq_lens"] - 1
    pages = given["page_table"][np.arange(len(last)), last // case["S"]]
    for cache in (given["k"], given["v"]):
        cache[pages, :, last % case["S"]] = np.nan
    return {
        **given,
        **random_rotations(rng, case),
        "slot_mapping": (pages * case["S"] + last % case["S"]).astype(np.int32),
    }


def _offset(case: Mapping[str, Any], offset: float) -> dict[str, float]:
    """An offset of the norms' weights, and a scale for which scores are as large as without it: the weights of a case
    are normal, and their squares with the offset are 1 + offset^2 on average."""
    return {"offset": offset, "scale": case["scale"] / (1 + offset**2)}


def _append_sizes(draw: Draw) -> dict[str, Any]:
    many = random_sequences(draw)
    new, seq_lens = [1] * many["b"], [n - m + 1 for n, m in zip(many["seq_lens"], many["new"], strict=True)]
    same = {name: many[name] for name in ("num_heads", "H", "D", "window", "S", "C", "softcap", "sinks")}
    case = attention_case(new=new, seq_lens=seq_lens, **same)
    turned, normed = dict.fromkeys(("rope_rows", "cos", "sin"), bool(draw(0, 1))), bool(draw(0, 1))
    given = {"q_norm": normed, "k_norm": normed, "eps": 1e-6, **_offset(case, draw(0, 1))}
    # A new key that is rotated or normalised may fall to the other side of a rounding to e4m3, which is 6% of it and no
    # fault. The cases with such a cache were chosen; random ones have it where keys are stored as they came.
    turns = normed or turned["cos"]
    return {**case, **turned, **given, "h": draw(1, case["D"] // 2), "R": draw(1, 99), **({"C": "T"} if turns else {})}


def _append_complete(s: Mapping[str, Any]) -> dict[str, Any]:
    """Sequences of one length, everything rotated, heads normalised."""
    given: dict[str, Any] = dict.fromkeys(("rope_rows", "cos", "sin", "q_norm", "k_norm"), True)
    return {**equal_sequences(s), **given, "eps": 1e-6, "h": s["D"] // 2, "R": 64}


def _append_cases() -> list[dict[str, Any]]:
    """The decode cases of attention, with and without rotation and qk_norm, fully and partially rotated."""
    found = []
    decode = (c for c in attention.cases if c["n"] == c["b"] and c["w"] > c["num_heads"] * c["D"])
    for i, case in enumerate(decode):
        half = case["D"] // 2 if i % 3 else case["D"] // 4
        # Of many sequences some new key would fall to the other side of a rounding, as in _append_sizes.
        as_they_come = case["C"] == "e4m3" and case["b"] > 8
        turned = dict.fromkeys(("rope_rows", "cos", "sin"), i % 4 != 3 and not as_they_come)
        normed = dict.fromkeys(("q_norm", "k_norm"), i % 2 == 0 and not as_they_come)
        found.append({**case, "h": half, "R": 11, "eps": 1e-6, **turned, **normed, **_offset(case, i // 2 % 2)})
    return found


append_attention = Op(
    "append_attention",
    "y[n,num_heads*D]:T, k[P,H,S,D]:C, v[P,H,S,D]:C = (x[n,(num_heads+2*H)*D]:T, slot_mapping[n]:i32, k[P,H,S,D]:C,"
    " v[P,H,S,D]:C, cu_seqlens[b+1]:i32, seq_lens[b]:i32, page_table[b,M]:i32, rope_rows[n]:i32?, cos[R,h]:f32?,"
    " sin[R,h]:f32?, q_norm[D]:T?, k_norm[D]:T?, sinks[num_heads]:T?, num_heads:i32, window:i32, scale:f32,"
    " eps:f32, offset:f32=0, softcap:f32=0)",
    doc="A decode step's attention, one new token per sequence (n = b): qk_norm (if there are q_norm and k_norm),"
    " rope (if there are cos and sin), kv_append and attention.",
    reference=_append_attention,
    kernels=_append_kernels,
    cases=_append_cases(),
    ranges={"rope_rows": "R"},
    sizes=_append_sizes,
    compiled=well_known,
    admitted_spills={
        "append_attention@120": (
            32,
            "one instance (heads of 128, a query head for each key head, tiles in registers), beside the 255 registers"
            " that a thread can have; other architectures take 254 of them",
        ),
    },
    inputs=_append_inputs,
    shape=DEFAULT_SIZES,
    rules=("num_heads % H == 0", "new == 1", "new <= length"),
    together=(("rope_rows", "cos", "sin"), ("q_norm", "k_norm")),
    complete=_append_complete,
    # Each part rounds to T: q and k twice before their product.
    tolerance={**attention.tolerance, "f16": 1.75, "bf16": 1.5},
    bytes=attention.bytes,
    flops=attention.flops,
    unaligned=False,
)
