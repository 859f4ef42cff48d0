"""Products of rows with the weights of the experts that compute them. Kernels: cuda_src/experts.cu (by multiply-adds),
experts_mma.cu (few pairs, on tensor cores), those of experts_many.py (many); of packed weights (experts_packed.py)
experts_packed.cu (few) and those of experts_many.py.

``sort_pairs`` (route.py) says which pairs of a row and an expert there are. A product gives a row for each pair, at the
pair's own number, so the next product, whose x has a row for each pair, takes the same ``pairs`` and ``offsets``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array
from .activation import gelu_tanh_mul, silu_mul
from .experts_many import MOST_PAIRS, many_launch, takes_many, tile_columns
from .experts_packed import Ways, packed_experts_plan
from .launch import Device, Launch, Plan
from .linear import PRODUCT_TOLERANCE, linear, tensor_shape
from .op import Call, Draw, Op
from .route import MAX_EXPERTS, sort_pairs
from .signature import OpError
from .weights import segments_of, stored_bytes

__all__ = [
    "chosen_experts",
    "expert_linear",
    "expert_linear_clamped_swiglu",
    "expert_linear_gelu_tanh_mul",
    "expert_linear_silu_mul",
    "experts_with_pairs",
    "packed_ways",
    "pair_inputs",
]

_WARP = 32
_THREADS, _BLOCKS = 256, 4  # experts.cu: threads of a block, and at most blocks for each multiprocessor

# Pairs for each expert of the model up to which experts_mma.cu takes them, if there are fewer blocks of tiles than
# multiprocessors. On an H200 the layer of Qwen3-30B-A3B takes, in microseconds, gate_up and down:
#     rows                      1     2     4     8    16    32    64
#     experts_mma.cu         19.9  34.5  58.5   100   154   214   241
#                            12.7  19.6  31.9  52.7  79.5   109   124
#     experts_many_wgmma.cu  26.6  32.8  58.8  90.5   128   176   191
#                            13.8  17.2  30.1  51.3  72.0  96.5   108
_FEW = 4
_LONGEST = 96  # experts_mma.cu: chunks of a phase; 128 spill registers
_RUN = 8  # experts_mma.cu: tiles of columns whose sums are kept where k goes in phases


def _expert_linear(x: Array, w: Array, pairs: Array, offsets: Array, b: Array | None = None) -> Array:
    slots = len(pairs) // len(x)
    y: Array | None = None
    for expert in np.flatnonzero(np.diff(offsets)):
        own = pairs[offsets[expert] : offsets[expert + 1]]
        product = linear.reference(x[own // slots], w[expert], None if b is None else b[expert])
        if y is None:
            y = np.empty((len(pairs), product.shape[1]), product.dtype)
        y[own] = product
    assert y is not None  # there is a pair
    return y


def _clamped_swiglu(x: Array, *, alpha: float, limit: float) -> Array:
    f = x.shape[1] // 2
    gate, up = np.minimum(x[:, :f], limit), np.clip(x[:, f:], -limit, limit)
    with np.errstate(over="ignore"):  # exp(-alpha gate) = inf gives the right limit, 0
        return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def _with_silu_mul(x: Array, w: Array, pairs: Array, offsets: Array, b: Array | None = None) -> Array:
    y: Array = silu_mul.reference(_expert_linear(x, w, pairs, offsets, b))
    return y


def _with_gelu_tanh_mul(x: Array, w: Array, pairs: Array, offsets: Array, b: Array | None = None) -> Array:
    y: Array = gelu_tanh_mul.reference(_expert_linear(x, w, pairs, offsets, b))
    return y


def _with_clamped_swiglu(
    x: Array, w: Array, pairs: Array, offsets: Array, b: Array | None = None, *, alpha: float, limit: float
) -> Array:
    return _clamped_swiglu(_expert_linear(x, w, pairs, offsets, b), alpha=alpha, limit=limit)


def _few(constants: Mapping[str, Any], call: Call, device: Device) -> Launch | None:
    """The launch of experts_mma.cu, if a block has enough shared memory for it."""
    shape = tensor_shape(call["k"], _RUN, device, _LONGEST)
    if shape is None:
        return None
    block = (_WARP * shape.warps,)
    own = {**constants, **shape.constants}
    return Launch("experts_mma.cu:expert_linear_mma", (device.sms,), block, shape.shared, own)


def _parts(constants: Mapping[str, Any]) -> int:
    """Rows of w that make a column of y."""
    return 1 if constants["ACT"] == "NO_ACT" else 2


def _plain(constants: Mapping[str, Any], most: int, call: Call, device: Device, E: int) -> Launch:
    """The launch for plain weights of so many experts, and any number of pairs. most: pairs of a tile."""
    if takes_many(call, device):
        launch = many_launch(constants, _parts(constants), call, device, E, most=most)
        if launch is not None:
            return launch
    pairs = call["n"] * call["s"]
    blocks = min(_BLOCKS * device.sms, -(-pairs * call["m"] // (_THREADS // _WARP)))
    return Launch("experts.cu:expert_linear", (blocks,), (_THREADS,), constants={**constants, "E": E})


def _streamed(call: Call, device: Device, parts: int) -> bool:
    """Whether weights are streamed for a few pairs at a time, and not multiplied in tiles of many."""
    pairs = call["n"] * call["s"]
    blocks = min(call["E"], pairs) * tile_columns(call["m"], parts)
    return bool(pairs <= _FEW * call["E"] and blocks < device.sms)


def _plan(act: str, call: Call, device: Device, ways: Ways | None = None) -> Plan:
    if call["E"] > MAX_EXPERTS:
        raise OpError(f"{call.op.name}: {call['E']} experts are more than the {MAX_EXPERTS} that the kernels take")
    constants = {"ACT": act, "alpha": 0.0, "limit": 0.0, **call.env}
    if segments_of(call.arrays["w"]) is not None:
        plain = partial(_plain, constants, MOST_PAIRS, call, device)
        return packed_experts_plan(constants, _parts(constants), call, device, plain, ways)
    # One way to add up on a deterministic device, whatever the number of rows.
    few = takes_many(call, device) and not device.deterministic and _streamed(call, device, _parts(constants))
    launch = _few(constants, call, device) if few else None
    return Plan((launch or _plain(constants, ways.rows if ways else MOST_PAIRS, call, device, call["E"]),))


def experts_with_pairs(call: Call) -> float:
    """Experts that have a pair; where only sizes are known, as many as are expected."""
    offsets = call.arrays["offsets"]
    if isinstance(offsets, np.ndarray):
        return float(np.count_nonzero(np.diff(offsets)))
    return chosen_experts(call["E"], call["s"], call["n"])


def chosen_experts(experts: int, each: int, rows: int) -> float:
    """How many experts have a row, if each row has ``each`` of them and all are as likely as others."""
    return float(experts * (1 - (1 - min(1, each / experts)) ** rows))


def _bytes(parts: int, call: Call) -> float:
    """Weights of the experts that were chosen, and every other array once."""
    pairs = call["n"] * call["s"]
    bias = parts * call["m"] * (call.arrays["b"] is not None)
    floats = experts_with_pairs(call) * bias + call["n"] * call["k"] + pairs * call["m"]
    weights, itemsize = call.arrays["w"], call.dtypes["T"].itemsize
    expert = stored_bytes(weights) / call["E"] if segments_of(weights) else parts * call["m"] * call["k"] * itemsize
    return float(experts_with_pairs(call) * expert + floats * itemsize + 4 * (pairs + call["E"] + 1))


def pair_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Pairs of rows with experts that ``chosen`` leaves, by default all."""
    rows, s, E = case["n"], case["s"], case["E"]
    among = rng.permutation(E)[: case.get("chosen", E)]
    experts = among[rng.random((rows, len(among))).argsort(-1)[:, :s]].astype(np.int32)
    pairs, offsets = sort_pairs.reference(experts, E=E)
    return {"pairs": pairs, "offsets": offsets}


def _sizes(draw: Draw) -> dict[str, Any]:
    E = draw(1, 20)
    return dict(n=draw(1, 30), s=(s := draw(1, min(E, 5))), E=E, m=draw(1, 70), k=draw(1, 20) * draw(1, 40),
                b=bool(draw(0, 1)), chosen=draw(s, E))  # fmt: skip


_CASES = (
    # One pair; few of each expert; all of one expert; some experts without; more than a tile; odd sizes.
    dict(n=1, s=1, E=1, m=8, k=8, b=False),
    dict(n=1, s=4, E=9, m=40, k=72, b=True),
    dict(n=3, s=2, E=5, m=33, k=72, b=True),
    dict(n=21, s=1, E=6, m=24, k=72, b=False, chosen=1),
    dict(n=90, s=2, E=4, m=72, k=200, b=True, chosen=3),
    dict(n=400, s=1, E=2, m=42, k=72, b=False, chosen=1),
    dict(n=6, s=2, E=3, m=10, k=61, b=False),
    # Packed: streamed, for one row and for several; many pairs, in tiles of 64 and of 128;
    # unpacked, where halves end within a block.
    dict(n=1, s=3, E=6, m=48, k=328, b=True, W="mxfp4"),
    dict(n=5, s=2, E=4, m=32, k=200, b=False, W="int4 g128", chosen=2),
    dict(n=70, s=1, E=2, m=48, k=136, b=True, W="fp8"),
    dict(n=100, s=2, E=3, m=144, k=424, b=True, W="mxfp4", chosen=2),
    dict(n=10, s=2, E=3, m=23, k=200, b=True, W="Q4_K"),
    # Packed and streamed for up to 16 pairs of an expert.
    dict(n=13, s=1, E=2, m=32, k=328, b=True, W="mxfp4", chosen=2),
    dict(n=22, s=1, E=2, m=16, k=200, b=False, W="Q4_K"),
)


_ACTS = {
    "expert_linear": "NO_ACT",
    "expert_linear_silu_mul": "SILU_MUL",
    "expert_linear_gelu_tanh_mul": "GELU_TANH_MUL",
    "expert_linear_clamped_swiglu": "CLAMPED_SWIGLU",
}


def packed_ways(op: Op, ways: Ways) -> Op:
    """One of these ops with another choice of the ways to compute a product with a packed weight, and of the pairs of a
    tile with any weight: to compare them, or where more is known of the pairs."""
    return replace(op, kernels=lambda call, device: _plan(_ACTS[op.name], call, device, ways))


# In two tiles of up to 256 pairs: for one of the ops, since a compiler takes seconds for that kernel.
_TALL = dict(n=257, s=1, E=2, m=16, k=200, b=False, W="mxfp4", chosen=1)


def _op(
    name: str, doc: str, reference: Any, cost: int = 0, cases: Sequence[Mapping[str, Any]] = _CASES, **knobs: float
) -> Op:
    """A product of the pairs' rows, with what comes behind it. cost: operations of an element of that; knobs: its
    attributes, with the values that they have in tests."""
    act = _ACTS[name]
    parts = 2 if act != "NO_ACT" else 1
    rows = "m" if parts == 1 else "2*m"
    attributes = "".join(f", {knob}:f32" for knob in knobs)
    return Op(
        name,
        f"y[n*s,m]:T = (x[n,k]:T, w[E,{rows},k]:W, pairs[n*s]:i32, offsets[E+1]:i32, b[E,{rows}]:T?{attributes})",
        doc=f"{doc} A row of y for each pair of a row and an expert: pair = row * s + slot, sorted as by sort_pairs.",
        reference=reference,
        kernels=lambda call, device: _plan(act, call, device),
        cases=[{**case, **knobs} for case in cases],
        sizes=lambda draw: {**_sizes(draw), **knobs},
        inputs=pair_inputs,
        shape=dict(n=1, s=8, E=128, m=768, k=2048, b=False, **knobs),
        tolerance=PRODUCT_TOLERANCE,
        bytes=lambda call: _bytes(parts, call),
        kernel_docs={
            "expert_linear": "y = act(x w^T + b) for each pair, by multiply-adds",
            "expert_linear_mma": "The same for few pairs of each expert, on tensor cores.",
            "expert_linear_packed": "The same for few pairs of each expert and packed weights.",
            "expert_linear_packed_many_mma": "The same for many pairs and packed weights, on tensor cores.",
            "expert_linear_packed_many_wgmma": "The same for many pairs and packed weights, on Hopper's tensor cores.",
            "unpack": "The numbers of packed weights of some experts, for many pairs.",
            "expert_linear_many_mma": "The same for many pairs, on tensor cores.",
            "expert_linear_many_wgmma": "The same for many pairs, on Hopper's tensor cores.",
        },
        flops=lambda c: c["n"] * c["s"] * c["m"] * (2 * parts * c["k"] + cost),
        unaligned=False,
    )


expert_linear = _op("expert_linear", "y[pair] = x[row] w[expert]^T + b[expert].", _expert_linear)

expert_linear_silu_mul = _op(
    "expert_linear_silu_mul",
    "y[pair] = silu_mul(x[row] w[expert]^T + b[expert]); the first m rows of w[expert] give what is put through silu.",
    _with_silu_mul,
    cost=5,
)

expert_linear_gelu_tanh_mul = _op(
    "expert_linear_gelu_tanh_mul",
    "y[pair] = gelu_tanh_mul(x[row] w[expert]^T + b[expert]); the first m rows of w[expert] give what is put through"
    " gelu.",
    _with_gelu_tanh_mul,
    cost=8,
)

expert_linear_clamped_swiglu = _op(
    "expert_linear_clamped_swiglu",
    "[g, u] = x[row] w[expert]^T + b[expert], g at most limit, u at most limit in size;"
    " y[pair] = g / (1 + exp(-alpha g)) * (u + 1), the activation of gpt-oss.",
    _with_clamped_swiglu,
    cost=7,
    cases=(*_CASES, _TALL),
    alpha=1.702,
    limit=7.0,
)
