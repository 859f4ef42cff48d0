"""The ops of the ladder: one signature and one reference, and a way to launch for each rung. Kernels:
cuda_src/ladder/.

They are no part of ``cuplama.ops.OPS``: what a model may run, the inventory of kernels, and the tests of ops do not see
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...dtypes import Array, upcast
from ...ops.launch import Device, Launch, Plan
from ...ops.op import Call, Draw, Op
from ...ops.signature import OpError

__all__ = [
    "DECODE_SIZES",
    "PREFILL_SIZES",
    "decode_block",
    "decode_split",
    "prefill_naive",
    "prefill_online",
    "prefill_tensor",
    "prefill_tiled",
]

PREFILL_SIZES: Mapping[str, Any] = dict(n=4096, s=4096, num_heads=32, H=8, D=128)
"""A prompt of 4,096 tokens, with the heads of Llama-3.1-8B."""
DECODE_SIZES: Mapping[str, Any] = dict(n=1, s=4096, num_heads=32, H=8, D=128)
"""One new token behind 4,095."""

_HEAD_DIMS = (64, 128)
_QUERIES = 256  # that the reference takes at a time, to bound the memory of the scores
_TILE = 64  # queries, and in rung 2 keys, of a block
_MAX_QUERIES = 65535  # blocks that a grid can have in its second direction
_MIN_KEYS = 64  # of a split: fewer would not pay for the block
_BLOCKS_PER_SM = 8  # of 256 threads, that a multiprocessor holds at once


def _attention(q: Array, k: Array, v: Array, *, num_heads: int, scale: float) -> Array:
    """Causal attention of the last n of s tokens. q: [n, num_heads*D]; k, v: [H, s, D]."""
    H, s, D = k.shape
    n, group = len(q), num_heads // H
    q, k, v = upcast(q), upcast(k), upcast(v)
    y = np.empty((n, num_heads * D), q.dtype)
    for at in range(0, n, _QUERIES):
        end = min(at + _QUERIES, n)
        high = s - n + end  # keys that the last of these queries sees
        rows = q[at:end].reshape(end - at, H, group, D).transpose(1, 2, 0, 3)
        scores = (rows @ k[:, None, :high].swapaxes(-1, -2)) * q.dtype.type(scale)
        hidden = np.arange(high) > s - n + np.arange(at, end)[:, None]
        scores = np.where(hidden, -np.inf, scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out = (scores @ v[:, None, :high]) / scores.sum(-1, keepdims=True)
        y[at:end] = out.transpose(2, 0, 1, 3).reshape(end - at, -1)
    return y


def _pairs(c: Call) -> float:
    """Pairs of a query and a key that the mask lets through."""
    n, s = c["n"], c["s"]
    return float(n * (s - n) + n * (n + 1) / 2)


def _bytes(c: Call) -> float:
    elements: int = 2 * c["D"] * (c["n"] * c["num_heads"] + c["s"] * c["H"])
    return elements * c.dtypes["T"].itemsize


def _complete(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {**sizes, "scale": sizes["D"] ** -0.5}


def _case(n: int, s: int, num_heads: int, H: int, D: int) -> dict[str, Any]:
    return _complete(dict(n=n, s=s, num_heads=num_heads, H=H, D=D))


def _random_case(draw: Draw, largest: int) -> dict[str, Any]:
    H, n = draw(1, 3), draw(1, largest)
    return _case(n, n + draw(0, 150), H * draw(1, 4), H, _HEAD_DIMS[draw(0, 1)])


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _checked(call: Call) -> tuple[int, int, int, int]:
    """(n, s, num_heads, D). Raises OpError for sizes that the kernels do not take."""
    n, s, num_heads, H, D = (call[name] for name in ("n", "s", "num_heads", "H", "D"))
    if D not in _HEAD_DIMS:
        raise OpError(f"{call.op.name}: D = {D} is neither 64 nor 128")
    if num_heads % H or s < n:
        raise OpError(f"{call.op.name}: needs num_heads % H == 0 and s >= n")
    if n > _MAX_QUERIES:
        raise OpError(f"{call.op.name}: n = {n}; {_MAX_QUERIES} at most")
    return n, s, num_heads, D


def _tiles(rows: int) -> int:
    return -(-rows // _TILE)


_SOFTMAX = "ladder/prefill_1_naive.cu:softmax_naive"


def _naive(call: Call, device: Device) -> Plan:
    n, s, num_heads, D = _checked(call)
    file = "ladder/prefill_1_naive.cu"
    launches = (
        Launch(f"{file}:scores_naive", (-(-s // 128), n, num_heads), (128,)),
        Launch(_SOFTMAX, (n, num_heads), (256,)),
        Launch(f"{file}:values_naive", (n, num_heads), (D,)),
    )
    return Plan(launches, {"scores": ((num_heads, n, s), "f32")})


def _tiled(call: Call, device: Device) -> Plan:
    n, s, num_heads, _ = _checked(call)
    file = "ladder/prefill_2_tiled.cu"
    launches = (
        Launch(f"{file}:scores_tiled", (_tiles(s), _tiles(n), num_heads), (256,)),
        Launch(_SOFTMAX, (n, num_heads), (256,)),
        Launch(f"{file}:values_tiled", (_tiles(n), num_heads), (256,)),
    )
    return Plan(launches, {"scores": ((num_heads, n, s), "f32")})


def _online(call: Call, device: Device) -> Plan:
    n, _, num_heads, D = _checked(call)
    rows, keys = _TILE, 32
    shared = 4 * ((rows + keys) * (D + 4) + rows * (keys + 4))
    return Plan((Launch("ladder/prefill_3_online.cu:attention_online", (_tiles(n), num_heads), (256,), shared),))


def _tensor(call: Call, device: Device) -> Plan:
    """float32, and GPUs before sm_80, have no such instruction: there this rung is the one below it."""
    n, _, num_heads, D = _checked(call)
    if device.arch < 80 or call.dtypes["T"].itemsize != 2:
        return _online(call, device)
    shared = 2 * 2 * 64 * (D + 8)  # tiles of keys and of values, 16 bits
    return Plan((Launch("ladder/prefill_4_tensor.cu:attention_tensor", (_tiles(n), num_heads), (128,), shared),))


def _ladder_op(name: str, doc: str, kernels: Callable[[Call, Device], Plan], decode: bool) -> Op:
    """An op of the ladder. decode: whether it takes one query alone."""
    prompts = [_case(1, 1, 2, 1, 64), _case(5, 5, 4, 2, 128), _case(1, 70, 2, 2, 128), _case(67, 131, 2, 1, 64)]
    steps = [_case(1, 1, 2, 1, 64), _case(1, 37, 4, 2, 64), _case(1, 300, 3, 1, 128), _case(1, 2100, 2, 2, 64)]
    return Op(
        name,
        "y[n,num_heads*D]:T = (q[n,num_heads*D]:T, k[H,s,D]:T, v[H,s,D]:T, num_heads:i32, scale:f32)",
        doc=doc,
        reference=_attention,
        kernels=kernels,
        cases=steps if decode else prompts,
        sizes=lambda draw: _random_case(draw, 1 if decode else 100),
        shape=DECODE_SIZES if decode else PREFILL_SIZES,
        rules=("num_heads % H == 0", "n <= s", *(("n == 1",) if decode else ())),
        complete=_complete,
        tolerance={"f32": 60.0},  # sums over thousands of keys, one after the other, as of the product's attention
        bytes=_bytes,
        flops=lambda c: 4 * c["num_heads"] * c["D"] * _pairs(c),
        unaligned=False,
    )


prefill_naive = _ladder_op("ladder_prefill_naive", "causal attention by three kernels", _naive, decode=False)
prefill_tiled = _ladder_op("ladder_prefill_tiled", "the same, in tiles in shared memory", _tiled, decode=False)
prefill_online = _ladder_op("ladder_prefill_online", "causal attention by an online softmax", _online, decode=False)
prefill_tensor = _ladder_op("ladder_prefill_tensor", "the same, on tensor cores", _tensor, decode=False)


# ---- a decode step ---------------------------------------------------------------------------------------------------


def _decode_checked(call: Call) -> tuple[int, int, int]:
    n, s, num_heads, D = _checked(call)
    if n != 1:
        raise OpError(f"{call.op.name}: n = {n}; a decode step has one query")
    return s, num_heads, D


def _block(call: Call, device: Device) -> Plan:
    _, num_heads, _ = _decode_checked(call)
    return Plan((Launch("ladder/decode_1_block.cu:decode_block", (num_heads,), (256,)),))


def _split(call: Call, device: Device) -> Plan:
    """As many splits as the GPU holds blocks for, but none of fewer than ``_MIN_KEYS`` keys."""
    s, num_heads, D = _decode_checked(call)
    splits = max(1, min(_BLOCKS_PER_SM * device.sms // num_heads, -(-s // _MIN_KEYS)))
    keys = -(-s // splits)
    splits = -(-s // keys)  # none is empty
    file = "ladder/decode_2_split.cu"
    launches = (
        Launch(f"{file}:decode_split", (splits, num_heads), (256,), constants={"splits": splits, "keys": keys}),
        Launch(f"{file}:decode_combine", (num_heads,), (D,), constants={"splits": splits}),
    )
    scratch = {"partial": ((num_heads, splits, D), "f32"), "stats": ((num_heads, splits, 2), "f32")}
    return Plan(launches, scratch)


decode_block = _ladder_op("ladder_decode_block", "attention of one query, a block a head", _block, decode=True)
decode_split = _ladder_op("ladder_decode_split", "the same, keys divided over blocks", _split, decode=True)
