"""Causal grouped-query attention of whole sequences to themselves, without a cache, and its gradient: for training.

Forward: the kernels of attention_prefill_*.cu, whose keys and values are then rows of x. Backward:
cuda_src/attention_backward_*.cu. Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name, upcast
from .attention import attention, check_head, prefill_launch
from .attention_cases import random_sinks, well_known
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .self_attention_hopper import hopper_plan
from .signature import OpError
from .softmax import capped, softmax
from .team import fill

__all__ = ["self_attention", "self_attention_backward", "self_attention_case"]

_ATTRIBUTES = ("num_heads", "H", "D", "window", "scale", "softcap")

_QUERIES = 128  # that the references take at a time: scores stay in the cache, and the causal half is not computed


class _Heads:
    """One KV head of one sequence: keys and values [n, D], queries and other rows of its group [group, n, D]."""

    def __init__(
        self, x: Array, head: int, num_heads: int, H: int, D: int, window: int, scale: float, softcap: float
    ) -> None:
        heads = x.reshape(len(x), -1, D)
        self._window, self.scale, self.softcap = window, x.dtype.type(scale), softcap
        self._group = slice(head * (num_heads // H), (head + 1) * (num_heads // H))
        self._D = D
        self.q, self.k, self.v = self.of(x), heads[:, num_heads + head], heads[:, num_heads + H + head]

    def of(self, rows: Array) -> Array:
        """The group's part of the rows of x, y or dy."""
        return np.ascontiguousarray(rows.reshape(len(rows), -1, self._D)[:, self._group].transpose(1, 0, 2))

    def tiles(self) -> Iterator[tuple[slice, slice, Array]]:
        """Queries, the keys that they see, and their scores [group, queries, keys]."""
        n = len(self.k)
        for first in range(0, n, _QUERIES):
            last = min(first + _QUERIES, n)
            low = max(0, first - self._window + 1) if self._window else 0
            distance = np.arange(first, last)[:, None] - np.arange(low, last)
            hidden = (distance < 0) | (distance >= self._window) if self._window else distance < 0
            scores = self.q[:, first:last] @ self.k[low:last].T
            scores *= self.scale
            scores = capped(scores, self.softcap)
            scores += np.where(hidden, -np.inf, 0).astype(scores.dtype)
            yield slice(first, last), slice(low, last), scores


def _attend(heads: _Heads, sink: Array | None) -> Array:
    """Outputs, and behind them the logarithm of the softmax's sum: [group, n, D + 1]. sink: [group, 1, 1] or None."""
    out = np.empty((*heads.q.shape[:2], heads.q.shape[2] + 1), heads.q.dtype)
    for rows, keys, p in heads.tiles():
        most, total = softmax(p, sink)
        out[:, rows, :-1] = (p @ heads.v[keys]) / total
        out[:, rows, -1:] = most + np.log(total)
    return out


def _differentiate(heads: _Heads, y: Array, lse: Array, dy: Array) -> Array:
    """Gradients of the group's queries, of the keys and of the values: [group + 2, n, D]. lse: [group, n, 1]."""
    group, n, D = heads.q.shape
    out = np.zeros((group + 2, n, D), heads.q.dtype)
    delta = (dy * y).sum(-1, keepdims=True)
    for rows, keys, p in heads.tiles():
        # tanh's derivative; 0 where a score is -inf because the mask shuts it out.
        slope = np.maximum(1 - (p / heads.softcap) ** 2, 0) if heads.softcap else 1
        p -= lse[:, rows]
        np.exp(p, out=p)
        ds = dy[:, rows] @ heads.v[keys].T
        ds -= delta[:, rows]
        ds *= p
        ds *= heads.scale * slope
        flat = p.reshape(-1, p.shape[-1]).T, ds.reshape(-1, p.shape[-1]).T
        out[group + 1, keys] += flat[0] @ dy[:, rows].reshape(-1, D)
        out[group, keys] += flat[1] @ heads.q[:, rows].reshape(-1, D)
        out[:group, rows] = ds @ heads.k[keys]
    return out


def _fill(out: Array, cu_seqlens: Array, piece: Callable[[slice, int], Array]) -> None:
    """Fill out [H, .., n, ..] with piece(rows, head) for every sequence and head."""
    sequences = [slice(a, b) for a, b in pairwise(cu_seqlens.tolist()) if b > a]
    pieces = [(rows, head) for rows in sequences for head in range(len(out))]
    work = sum((rows.stop - rows.start) ** 2 for rows in sequences) * out[:, :, 0].size
    fill([out[head][:, rows] for rows, head in pieces], [partial(piece, *each) for each in pieces], work)


def _self_attention(
    x: Array, cu_seqlens: Array, sinks: Array | None = None,
    *, num_heads: int, H: int, D: int, window: int, scale: float, softcap: float = 0.0,
) -> tuple[Array, Array]:  # fmt: skip
    x = upcast(x)
    sink = [None] * H if sinks is None else upcast(sinks).reshape(H, -1, 1, 1)

    def piece(rows: slice, head: int) -> Array:
        return _attend(_Heads(x[rows], head, num_heads, H, D, window, scale, softcap), sink[head])

    out = np.zeros((H, num_heads // H, len(x), D + 1), x.dtype)
    _fill(out, cu_seqlens, piece)
    heads = out.reshape(num_heads, len(x), D + 1).transpose(1, 0, 2)
    return heads[..., :D].reshape(len(x), -1), np.ascontiguousarray(heads[..., D])


def _self_attention_backward(
    x: Array, y: Array, lse: Array, dy: Array, cu_seqlens: Array,
    *, num_heads: int, H: int, D: int, window: int, scale: float, softcap: float = 0.0,
) -> Array:  # fmt: skip
    x, y, dy = upcast(x), upcast(y), upcast(dy)

    def piece(rows: slice, head: int) -> Array:
        heads = _Heads(x[rows], head, num_heads, H, D, window, scale, softcap)
        sums = lse[rows].reshape(-1, H, num_heads // H, 1)[:, head].transpose(1, 0, 2)
        return _differentiate(heads, heads.of(y[rows]), sums, heads.of(dy[rows]))

    out = np.zeros((H, num_heads // H + 2, len(x), D), x.dtype)
    _fill(out, cu_seqlens, piece)
    dq = out[:, :-2].reshape(num_heads, len(x), D)
    return np.concatenate([dq, out[:, -2], out[:, -1]]).transpose(1, 0, 2).reshape(len(x), -1)


def self_attention_case(
    num_heads: int, H: int, D: int, lengths: list[int], window: int = 0, empty: int = 0, softcap: float = 0.0,
    sinks: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A case of sequences of those lengths. empty: sequences without a token behind them."""
    return dict(
        n=sum(lengths), b=len(lengths) + empty, num_heads=num_heads, H=H, D=D, lengths=lengths + [0] * empty,
        window=window, scale=D**-0.5, softcap=softcap, sinks=sinks,
    )  # fmt: skip


_CASES = [
    self_attention_case(1, 1, 8, [1]),
    self_attention_case(4, 2, 64, [5]),
    self_attention_case(4, 1, 64, [33, 1, 7], empty=2),
    self_attention_case(3, 3, 16, [70], window=16),
    self_attention_case(6, 2, 40, [9, 20, 1], window=7),
    self_attention_case(2, 1, 128, [65, 64]),
    self_attention_case(3, 1, 96, [40, 0, 30], window=33),
    self_attention_case(8, 1, 32, [50], window=3),
    self_attention_case(2, 2, 16, [70, 4], window=2),
    self_attention_case(2, 1, 72, [35], window=1),
    self_attention_case(4, 1, 256, [37, 2]),
    self_attention_case(3, 1, 112, [66]),
    self_attention_case(2, 2, 200, [70]),
    self_attention_case(2, 1, 64, [200], window=130),
    # the soft limits of Gemma 2, the sinks of gpt-oss, and both
    self_attention_case(2, 1, 8, [6], softcap=0.5),
    self_attention_case(2, 1, 256, [37], softcap=1.5),
    self_attention_case(2, 1, 128, [40], softcap=1.5),
    self_attention_case(2, 1, 320, [20, 3]),
    self_attention_case(8, 1, 64, [35], window=20, sinks=True),
    self_attention_case(4, 2, 64, [70, 5], window=40, softcap=1.5, sinks=True),
]

_SHAPE: Mapping[str, Any] = dict(num_heads=32, H=8, D=128, b=1, length=4096, window=0)


def _complete(s: Mapping[str, Any]) -> dict[str, Any]:
    """The case of ``b`` sequences of one length."""
    return self_attention_case(s["num_heads"], s["H"], s["D"], [s["length"]] * s["b"], s["window"])


def _random_sizes(draw: Draw) -> dict[str, Any]:
    """Up to three sequences, of which some are empty, and up to eight query heads for a key head."""
    H, D, group = draw(1, 2), 8 * draw(1, 20), (1, 3, 4, 8)[draw(0, 3)]
    lengths = [draw(1, 70), *(draw(0, 1) * draw(1, 40) for _ in range(draw(0, 2)))]
    window, empty, softcap = draw(0, 1) * draw(1, 50), draw(0, 2), draw(0, 1) * 0.25 * draw(1, 9)
    return self_attention_case(H * group, H, D, lengths, window, empty, softcap, sinks=bool(draw(0, 1)))


def _pairs(c: Call) -> float:
    """Query-key pairs that the mask lets through. Needs the lengths, so it reads them from the device."""
    array: Any = c.arrays["cu_seqlens"]
    bounds = np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float64)
    length = np.diff(bounds)
    seen = np.minimum(length, c["window"] or np.inf)  # of the last token
    return float((seen * (seen + 1) / 2 + (length - seen) * seen).sum())


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    cu_seqlens = np.concatenate([[0], np.cumsum(case["lengths"])]).astype(np.int32)
    return {"cu_seqlens": cu_seqlens, "sinks": random_sinks(rng, case, T)}


def _backward_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """y and lse are those of x, with sinks if the case has them: other ones would be no gradient."""
    given = _inputs(rng, case, T)
    width = (case["num_heads"] + 2 * case["H"]) * case["D"]
    x = rng.standard_normal((case["n"], width)).astype(np.float32).astype(T)
    attrs = {name: case[name] for name in _ATTRIBUTES}
    y, lse = _self_attention(x, given["cu_seqlens"], given["sinks"] if case["sinks"] else None, **attrs)
    return {**given, "x": x, "y": y.astype(T), "lse": lse.astype(np.float32)}


def _gradient(g: Gradient) -> None:
    if g.has("sinks") and g.wants("sinks"):
        raise OpError("self_attention: sinks have no gradient yet; a model that has them trains if they are frozen")
    attrs = {name: g.attr(name) for name in _ATTRIBUTES}
    ins = (g["x"], g["y"], g["lse"], g.of("y"), g["cu_seqlens"])
    g.give("x", g.emit("self_attention_backward", *ins, **attrs))


# What the kernels of attention_prefill_*.cu take for keys, values and lengths where there is no cache.
_ROWS = {"k": "x", "v": "x", "seq_lens": "cu_seqlens", "page_table": "cu_seqlens"}


def _kernels(call: Call, device: Device) -> Plan:
    launch = prefill_launch(call, device, 0, M=0, C=dtype_name(call.dtypes["T"]))
    return Plan((replace(launch, names=_ROWS),))


self_attention = Op(
    "self_attention",
    "y[n,num_heads*D]:T, lse[n,num_heads]:f32 = (x[n,(num_heads+2*H)*D]:T, cu_seqlens[b+1]:i32, sinks[num_heads]:T?,"
    " num_heads:i32, H:i32, D:i32, window:i32, scale:f32, softcap:f32=0)",
    doc="y = softmax(q k^T * scale) v per head, and lse = log(sum(exp(q k^T * scale))). Sequence i is rows"
    " cu_seqlens[i]..cu_seqlens[i+1] of x, which hold queries, keys and values; every row belongs to one, and a"
    " sequence may be empty. A token sees itself and what came before, the last `window` tokens only if window > 0."
    " softcap and sinks: as in attention; lse is with the sink. D: a multiple of 8 up to 256, or of 16 up to 512.",
    reference=_self_attention,
    kernels=_kernels,
    kernel_docs=attention.kernel_docs,
    cases=_CASES,
    sizes=_random_sizes,
    compiled=well_known,
    inputs=_inputs,
    shape=_SHAPE,
    complete=_complete,
    rules=("num_heads % H == 0",),
    tolerance=attention.tolerance,
    flops=lambda c: 4 * c["num_heads"] * c["D"] * _pairs(c),
    unaligned=False,
    gradient=_gradient,
)

_DELTA_THREADS = 256


def _delta(call: Call) -> Launch:
    """The launch of attention_delta.cu."""
    rows, D = call["n"] * call["num_heads"], call["D"]
    lanes = 1 << (-(-D // (8 if D <= 256 else 16)) - 1).bit_length()  # that share a row, 8 or 16 elements each
    grid = -(-rows // (_DELTA_THREADS // lanes))
    constants = {"rows": rows, "LANES": lanes}
    return Launch("attention_delta.cu:attention_delta", (grid,), (_DELTA_THREADS,), constants=constants)


def _fma(call: Call, device: Device) -> Iterator[Launch]:
    """attention_backward_fma.cu: a kernel per tile of keys, and one per tile of rows."""
    n, b, group, H, D = call["n"], call["b"], call["num_heads"] // call["H"], call["H"], call["D"]
    roomy = device.shared >= 2 * 96 * 1024  # for two blocks; others keep to the 64 KiB that sm_75 has
    for kernel, rows, sizes, widest in (
        ("keys", n, ("KEYS", "ROWS"), 96),  # of 64 keys more sums than this do not fit into registers
        ("queries", n * group, ("ROWS", "KEYS"), 128),
    ):
        large = D <= 64 or (widest >= D and roomy)
        kept, passing = (64, 32) if large else (32, 32) if D <= 128 else (16, 16)
        shared = 4 * ((2 * kept + passing) * (-(-D // 32) * 32 + 4) + kept * (passing + 4))
        yield Launch(
            f"attention_backward_fma.cu:attention_backward_{kernel}_fma", (rows // kept + b, H), (256,), shared,
            constants={**dict(zip(sizes, (kept, passing), strict=True)), "CAPPED": call["softcap"] != 0},
        )  # fmt: skip


def _mma(call: Call, device: Device) -> Iterator[Launch]:
    """attention_backward_mma.cu, with the largest tiles that registers and shared memory hold."""
    n, b, group, H, D = call["n"], call["b"], call["num_heads"] // call["H"], call["H"], call["D"]
    file, row_bytes = "attention_backward_mma.cu", 2 * (-(-D // 16) * 16)
    if D <= 64:
        KEYS, ROWS = (128, 32) if device.arch <= 90 else (64, 64)  # later compilers' allotment: 128 keys would spill
    else:
        KEYS, ROWS = (64, 32) if D <= 128 else (32, 32)
    yield Launch(
        f"{file}:attention_backward_keys_mma", ((n // KEYS + b) * H,), (128,), row_bytes * (2 * KEYS + 4 * ROWS),
        constants={"KEYS": KEYS, "ROWS": ROWS, "SPLIT": 1 if D <= 128 else 2, "CAPPED": call["softcap"] != 0},
    )  # fmt: skip
    ROWS = 128 if D <= 96 else 64
    # Two blocks for each multiprocessor if they fit with 32 keys, else one.
    sizes = {
        keys: row_bytes * (2 * ROWS + 4 * keys) for keys in ((64, 32, 16) if D <= 64 or 96 < D <= 128 else (32, 16))
    }
    room = device.shared // 2 if sizes[32] <= device.shared // 2 else device.shared
    KEYS = next(keys for keys, size in sizes.items() if size <= room)
    yield Launch(
        f"{file}:attention_backward_queries_mma", ((n * group // ROWS + b) * H,), (128,),
        row_bytes * (2 * ROWS + 4 * KEYS), constants={"ROWS": ROWS, "KEYS": KEYS, "CAPPED": call["softcap"] != 0},
    )  # fmt: skip


def _backward_kernels(call: Call, device: Device) -> Plan:
    check_head(call["D"])
    if (plan := hopper_plan(call, device)) is not None:
        return plan
    scratch = {"delta": ((call["n"], call["num_heads"]), "f32")}
    tensor = device.arch >= 80 and call.dtypes["T"].itemsize == 2 and call["D"] <= 256
    return Plan((_delta(call), *(_mma if tensor else _fma)(call, device)), scratch)


self_attention_backward = Op(
    "self_attention_backward",
    "dx[n,(num_heads+2*H)*D]:T = (x[n,(num_heads+2*H)*D]:T, y[n,num_heads*D]:T, lse[n,num_heads]:f32,"
    " dy[n,num_heads*D]:T, cu_seqlens[b+1]:i32, num_heads:i32, H:i32, D:i32, window:i32, scale:f32, softcap:f32=0)",
    doc="The gradient of self_attention for queries, keys and values, which lie as in x. Sinks are in y and lse.",
    reference=_self_attention_backward,
    kernels=_backward_kernels,
    kernel_docs={
        "prepare_backward": "Rows of attention's output times its gradient, and the order of the blocks to come.",
        "attention_backward_wgmma": "Gradients of queries, keys and values, on Hopper's tensor cores (wgmma).",
        "convert_dq": "Gradients of queries, rounded to the model's dtype.",
        "attention_delta": "A row of attention's output times its gradient, for the softmax's backward pass.",
        "attention_backward_keys_mma": "Gradients of keys and values, on tensor cores (mma.sync).",
        "attention_backward_queries_mma": "Gradients of queries, on tensor cores (mma.sync).",
        "attention_backward_keys_fma": "Gradients of keys and values, by multiply-adds.",
        "attention_backward_queries_fma": "Gradients of queries, by multiply-adds.",
    },
    cases=_CASES,
    sizes=_random_sizes,
    compiled=well_known,
    inputs=_backward_inputs,
    shape=_SHAPE,
    complete=_complete,
    rules=("num_heads % H == 0",),
    tolerance=attention.tolerance,
    flops=lambda c: 10 * c["num_heads"] * c["D"] * _pairs(c),
    unaligned=False,
    admitted_spills={
        "attention_backward_wgmma@90": (
            48,
            "With D = 128 the warps that fetch have 24 registers, so that those that compute have 240; they save some"
            " (24 bytes) once for each tile, while they wait for it. Soft limits take some more (24 bytes).",
        ),
        "attention_backward_queries_mma@90": (
            16,
            "one instance (D = 256 and soft limits), beside the 255 registers that a thread can have; half as many keys"
            " a tile would cost more, and no other architecture spills there",
        ),
    },
)
