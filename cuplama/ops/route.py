"""Which experts compute a row, and what becomes of what they gave. Kernels: cuda_src/route.cu.

Mixtures of experts: Shazeer et al., "Outrageously Large Neural Networks", arXiv:1701.06538. Choice by groups and a bias
that balances experts: DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437. Sparse mixer: Liu et al., "GRIN:
GRadient-INformed MoE", arXiv:2409.12136.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError

__all__ = ["MAX_EXPERTS", "combine_pairs", "route", "route_pairs", "route_sparsemixer", "sort_pairs"]

MAX_EXPERTS = 512
"""Experts that the kernels can choose from; as in cuda_src/experts.cuh."""

_WARP = 32
_ROUTE_ROWS = 4  # of a block of the routes; as in route.cu
_FEW_ROWS = 8  # that route_pairs takes
_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors
_MIN_SORTING, _MAX_SORTING = 128, 512  # threads of the block that sorts
_LEAST_SUM = 1e-20  # added to a sum of scores, which may all be 0


def _best(by: Array, count: int) -> Array:
    """The places of the largest elements of each row, in their order; of equal ones the lower place first, NaN last."""
    return np.argsort(-by, axis=-1, kind="stable")[:, :count]


def _route(
    logits: Array,
    bias: Array | None = None,
    scale: Array | None = None,
    *,
    k: int,
    sigmoid: int = 0,
    groups: int = 1,
    kept: int = 1,
    renormalise: int = 1,
    factor: float = 1.0,
) -> tuple[Array, Array]:
    with np.errstate(over="ignore", invalid="ignore"):  # exp(-logit) = inf gives the right limit, 0
        if sigmoid:
            scores = 1 / (1 + np.exp(-logits))
        else:
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores = scores / scores.sum(-1, keepdims=True)
    by, worth = (logits, scores) if bias is None else (scores + bias, scores + bias)
    if groups > 1:
        two = np.sort(worth.reshape(len(by), groups, -1), axis=-1)[:, :, -2:].sum(-1)
        shut = np.ones(two.shape, bool)
        np.put_along_axis(shut, _best(two, kept), False, axis=-1)
        by = np.where(np.repeat(shut, by.shape[1] // groups, axis=-1), -np.inf, by)
    experts = _best(by, k)
    weights = np.take_along_axis(scores, experts, -1)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdims=True) + _LEAST_SUM)
    weights = weights * factor
    return experts.astype(np.int32), weights if scale is None else weights * scale[experts]


def _route_sparsemixer(logits: Array, *, k: int, threshold: float) -> tuple[Array, Array]:
    experts = _best(logits, k)
    weights = np.empty(experts.shape, logits.dtype)
    left = logits.copy()
    for slot, chosen in enumerate(experts.T):
        largest = np.take_along_axis(logits, chosen[:, None], -1)
        with np.errstate(invalid="ignore"):  # 0 / 0 is not more than the threshold
            far = (largest - logits) / np.maximum(np.abs(logits), largest) > threshold
        weights[:, slot] = 1 / np.exp(np.where(far, -np.inf, left) - largest).sum(-1)
        np.put_along_axis(left, chosen[:, None], -np.inf, axis=-1)
    return experts.astype(np.int32), weights


def _sort_pairs(experts: Array, *, E: int) -> tuple[Array, Array]:
    offsets = np.zeros(E + 1, np.int32)
    np.cumsum(np.bincount(experts.reshape(-1), minlength=E), out=offsets[1:])
    return np.argsort(experts.reshape(-1), kind="stable").astype(np.int32), offsets


@wraps(_route, assigned=())  # for its signature
def _route_pairs(logits: Array, *beside: Any, **attributes: Any) -> tuple[Array, ...]:
    experts, weights = _route(logits, *beside, **attributes)
    return *_sort_pairs(experts, E=logits.shape[1]), experts, weights


def _combine_pairs(x: Array, weights: Array, a: Array | None = None) -> Array:
    n, s = weights.shape
    x = upcast(x).reshape(n, s, -1)
    y = np.zeros_like(x[:, 0]) if a is None else a.astype(x.dtype)
    for slot in range(s):
        y += weights[:, slot, None] * x[:, slot]
    return y


def _lane_experts(call: Call) -> int:
    """Experts of a lane, as a power of two."""
    if call["E"] > MAX_EXPERTS:
        raise OpError(f"{call.op.name}: {call['E']} experts are more than the {MAX_EXPERTS} that the kernels take")
    each = -(-int(call["E"]) // _WARP)
    return 1 << (each - 1).bit_length()


def _route_kernels(call: Call, device: Device) -> Plan:
    grid = (-(-call["n"] // _ROUTE_ROWS),)
    return Plan(
        (Launch(f"route.cu:{call.op.name}", grid, (_ROUTE_ROWS * _WARP,), constants={"EACH": _lane_experts(call)}),)
    )


def _route_pairs_kernels(call: Call, device: Device) -> Plan:
    threads = max(_THREADS, call["n"] * _WARP)
    return Plan((Launch("route.cu:route_pairs", (1,), (threads,), constants={"EACH": _lane_experts(call)}),))


def _sort_kernels(call: Call, device: Device) -> Plan:
    _lane_experts(call)
    threads = max(_MIN_SORTING, min(_MAX_SORTING, 1 << (call["n"] * call["k"] - 1).bit_length()))
    return Plan((Launch("route.cu:sort_pairs", (1,), (threads,), threads // _WARP * call["E"] * 4),))


def _combine_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("route.cu:combine_pairs", (call["n"], -(-call["d"] // (8 * _THREADS))), (_THREADS,)),))


def _logits(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    logits = 2 * rng.standard_normal((case["n"], case["E"])).astype(np.float32)
    if case.get("ties"):
        logits = np.round(logits)
    if case.get("broken"):  # a row each of nothing but NaN, and of -infinity and one NaN
        logits[0], logits[1], logits[1, 3] = np.nan, -np.inf, np.nan
    return {"logits": logits}


def _chosen(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    n, k, E = case["n"], case["k"], case["E"]
    if case.get("one"):  # all rows have the same experts, the last ones
        return {"experts": np.tile(np.arange(E - k, E, dtype=np.int32), (n, 1))}
    return {"experts": rng.random((n, E)).argsort(-1)[:, :k].astype(np.int32)}


def _sizes(draw: Draw) -> dict[str, Any]:
    E = draw(1, 100)
    return dict(n=draw(1, 9), E=E, k=draw(1, min(E, 10)), bias=bool(draw(0, 1)), scale=bool(draw(0, 1)),
                sigmoid=draw(0, 1), renormalise=draw(0, 1), factor=2.5, threshold=0.02)  # fmt: skip


_NEITHER = dict(bias=False, scale=False)
_ROUNDED: Mapping[str, float] = {"f32": 16.0}  # exponentials of the hardware, and a sum of all of them

route = Op(
    "route",
    "experts[n,k]:i32, weights[n,k]:f32 = (logits[n,E]:f32, bias[E]:f32?, scale[E]:f32?, k:i32, sigmoid:i32=0,"
    " groups:i32=1, kept:i32=1, renormalise:i32=1, factor:f32=1)",
    doc="The k experts of each row whose score + bias is largest, the lower index first among equals, with weights."
    " Scores are softmax(logits), or with `sigmoid` the sigmoid of each; without a bias the logits are"
    " compared, which have the same order. groups > 1: only among the `kept` groups of E / groups neighbours whose two"
    " best add up to most. A weight is the score, with `renormalise` over the sum of those chosen, times factor and the"
    " expert's scale. A softmax over the chosen logits alone is a renormalised softmax over all.",
    reference=_route,
    kernels=_route_kernels,
    cases=[
        dict(n=1, E=8, k=2, **_NEITHER),
        dict(n=5, E=60, k=4, **_NEITHER, renormalise=0),
        dict(n=3, E=128, k=8, ties=True, **_NEITHER),
        dict(n=4, E=64, k=6, bias=True, scale=False, sigmoid=1, factor=2.5),
        dict(n=6, E=256, k=8, bias=True, scale=False, sigmoid=1, groups=8, kept=4, factor=2.5),
        dict(n=2, E=512, k=10, bias=False, scale=True),
        dict(n=3, E=20, k=3, bias=False, scale=False, groups=5, kept=2, renormalise=0),
        dict(n=9, E=40, k=32, bias=True, scale=True, renormalise=0),
        dict(n=2, E=20, k=20, bias=False, scale=False, ties=True),
        dict(n=3, E=37, k=4, **_NEITHER, broken=True),
    ],
    sizes=_sizes,
    inputs=_logits,
    shape=dict(n=1, E=128, k=8, **_NEITHER),
    rules=("k <= 32", "k <= E // groups * kept", "groups <= 32", "E % groups == 0", "kept <= groups"),
    tolerance=_ROUNDED,
)

route_sparsemixer = Op(
    "route_sparsemixer",
    "experts[n,k]:i32, weights[n,k]:f32 = (logits[n,E]:f32, k:i32, threshold:f32)",
    doc="The k largest logits of each row, the lower index first among equals. The weight of each is its share in a"
    " softmax over those not chosen before it, of which those are left out that lie more than `threshold` below it,"
    " relative to the larger of it and their own size.",
    reference=_route_sparsemixer,
    kernels=_route_kernels,
    cases=[
        dict(n=1, E=16, k=2, threshold=0.02),
        dict(n=7, E=16, k=2, threshold=0.5),
        dict(n=3, E=70, k=3, threshold=1.0, ties=True),
    ],
    sizes=_sizes,
    inputs=_logits,
    rules=("k <= 32", "k <= E"),
    tolerance=_ROUNDED,
)

sort_pairs = Op(
    "sort_pairs",
    "pairs[n*k]:i32, offsets[E+1]:i32 = (experts[n,k]:i32, E:i32)",
    doc="The pairs of a row and one of its experts, as row * k + slot, sorted by expert and then by number; those of"
    " expert e are pairs[offsets[e] : offsets[e + 1]].",
    reference=_sort_pairs,
    kernels=_sort_kernels,
    cases=[
        dict(n=1, k=1, E=1),
        dict(n=1, k=8, E=128),
        dict(n=5, k=2, E=9),
        dict(n=70, k=4, E=32),
        dict(n=33, k=3, E=7, one=True),
        dict(n=2, k=5, E=300),
        dict(n=211, k=10, E=512),
    ],
    sizes=_sizes,
    inputs=_chosen,
    shape=dict(n=2048, k=8, E=128),
    rules=("k <= E",),
)

route_pairs = Op(
    "route_pairs",
    "pairs[n*k]:i32, offsets[E+1]:i32, experts[n,k]:i32, weights[n,k]:f32 = (logits[n,E]:f32, bias[E]:f32?,"
    " scale[E]:f32?, k:i32, sigmoid:i32=0, groups:i32=1, kept:i32=1, renormalise:i32=1, factor:f32=1)",
    doc="What route chooses for up to 8 rows, and the pairs of rows and experts as sort_pairs gives them.",
    reference=_route_pairs,
    kernels=_route_pairs_kernels,
    cases=[
        dict(n=1, E=8, k=2, **_NEITHER),
        dict(n=8, E=128, k=8, ties=True, **_NEITHER, renormalise=0),
        dict(n=3, E=60, k=32, **_NEITHER, sigmoid=1, factor=2.5),
        dict(n=5, E=64, k=6, bias=True, scale=True, sigmoid=1, groups=8, kept=4),
        dict(n=3, E=37, k=4, **_NEITHER, broken=True),
    ],
    sizes=lambda draw: {**_sizes(draw), "n": draw(1, _FEW_ROWS)},
    inputs=_logits,
    shape=dict(n=1, E=128, k=8, **_NEITHER),
    rules=(*route.rules, f"n <= {_FEW_ROWS}"),
    tolerance=_ROUNDED,
)

combine_pairs = Op(
    "combine_pairs",
    "y[n,d]:f32 = (x[n*s,d]:U, weights[n,s]:f32, a[n,d]:f32?)",
    doc="y[i] = a[i] + sum over s of weights[i,s] * x[i * s + slot], in the order of the slots; a may be left out",
    reference=_combine_pairs,
    kernels=_combine_kernels,
    cases=[
        dict(n=n, s=s, d=d, a=a, U=U)
        for n, s, d, a, U in (
            (1, 8, 64, True, "T"),
            (3, 2, 7, False, "T"),
            (2, 4, 1096, True, "f32"),
            (5, 1, 200, False, "T"),
        )
    ],
    sizes=lambda draw: dict(n=draw(1, 5), s=draw(1, 8), d=draw(1, 2000), a=bool(draw(0, 1)), U="T"),
    shape=dict(n=1, s=8, d=2048, a=True, U="T"),
    flops=lambda c: 2 * c["n"] * c["s"] * c["d"],
)
