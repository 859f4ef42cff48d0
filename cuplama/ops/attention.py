"""Causal grouped-query attention over the paged cache. Kernels: cuda_src/attention_decode.cu for one new token of each
sequence; attention_prefill_wgmma.cu, attention_prefill_mma.cu or attention_prefill_fma.cu for many, by what the GPU and
the dtype allow.

Grouped queries: Ainslie et al., arXiv:2305.13245. Online softmax: Milakov & Gimelshein, arXiv:1805.02867;
tiling: Dao, "FlashAttention-2", arXiv:2307.08691; Shah et al., "FlashAttention-3", arXiv:2407.08608.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name, upcast
from .attention_cases import CASES, DEFAULT_SIZES, attention_inputs, equal_sequences, random_sequences, well_known
from .decode_blocks import decode_blocks, on_tensor_cores, room_bytes
from .launch import Device, Launch, Plan
from .op import Call, Op
from .signature import OpError
from .softmax import capped, softmax
from .team import fill

__all__ = [
    "HEAD_DIMS",
    "attention",
    "check_head",
    "decode_plan",
    "prefill_launch",
]

_QUERIES = 128  # that the reference takes at a time, to bound the memory of the scores


def _attention(
    x: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    seq_lens: Array,
    page_table: Array,
    sinks: Array | None = None,
    *,
    num_heads: int,
    window: int,
    scale: float,
    softcap: float = 0.0,
) -> Array:
    _, num_kv_heads, size, d = k.shape
    x = upcast(x)
    y = np.zeros((len(x), num_heads * d), x.dtype)
    x = x[:, : num_heads * d].reshape(len(x), num_kv_heads, -1, d)
    sink = None if sinks is None else upcast(sinks).reshape(num_kv_heads, -1, 1, 1)
    attend = partial(_attend, sink=sink, window=window, scale=scale, softcap=softcap)
    for i, length in enumerate(seq_lens.tolist()):
        if not length:
            continue  # a row of a decode step that belongs to no sequence
        first, last = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
        pages = page_table[i, : -(-length // size)]
        keys, values = (
            upcast(c[pages]).transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, d)[:, :length] for c in (k, v)
        )  # [H, length, D]
        cuts = [slice(at, min(at + _QUERIES, last)) for at in range(first, last, _QUERIES)]
        fill(
            [y[rows] for rows in cuts],
            [partial(attend, x[rows], keys, values, length - last + rows.start) for rows in cuts],
            (last - first) * length * num_heads * d,
        )
    return y


def _attend(
    q: Array, keys: Array, values: Array, start: int, *, sink: Array | None, window: int, scale: float, softcap: float
) -> Array:
    """The attention of consecutive queries [n, H, heads, D] of one sequence, the first at position ``start``.

    sink: [H, heads, 1, 1] or None.
    """
    n, num_kv_heads, group, d = q.shape
    position = start + np.arange(n)  # of each query in its sequence
    low = max(0, start - window + 1) if window else 0
    high = start + n
    scores = q.transpose(1, 2, 0, 3).reshape(num_kv_heads, -1, d) @ keys[:, low:high].transpose(0, 2, 1)
    scores = capped(scores.reshape(num_kv_heads, group, n, high - low) * q.dtype.type(scale), softcap)
    if n > 1:  # a single query sees every key in [low, high)
        distance = position[:, None] - np.arange(low, high)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        scores += np.where(hidden, -np.inf, 0).astype(q.dtype)
    _, total = softmax(scores, sink)
    out = scores.reshape(num_kv_heads, -1, high - low) @ values[:, low:high]
    out = out.reshape(num_kv_heads, group, n, d) / total
    return out.transpose(2, 0, 1, 3).reshape(n, -1)


def _host(array: Array) -> np.ndarray[Any, Any]:
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _pairs(c: Call) -> float:
    """Query-key pairs that the mask lets through. Needs the seq_lens, so it reads them from the device."""
    cu_seqlens, seq_lens = _host(c.arrays["cu_seqlens"]), _host(c.arrays["seq_lens"])
    total = 0.0
    for new, length in zip(np.diff(cu_seqlens), seq_lens, strict=True):
        seen = np.arange(length - new, length, dtype=np.float64) + 1
        total += float(np.minimum(seen, c["window"]).sum() if c["window"] else seen.sum())
    return total


def _bytes(c: Call) -> float:
    seen = int(np.minimum(_host(c.arrays["seq_lens"]), c["window"] or 2**31 - 1).sum())
    cached, rows = 2 * seen * c["H"] * c["D"], 2 * c["n"] * c["num_heads"] * c["D"]
    return float(cached * c.dtypes["C"].itemsize + rows * c.dtypes["T"].itemsize)


def _kernels(call: Call, device: Device) -> Plan:
    # The two kernels add in different orders: a decode step that may not differ from a prompt takes the prompt's.
    decode = call["n"] == call["b"] and not device.deterministic
    return decode_plan("attention_decode", call, device) if decode else _prefill(call, device)


HEAD_DIMS = (*range(8, 257, 8), *range(272, 513, 16))
"""Head sizes that the kernels can have."""


def check_head(D: int) -> None:
    """Raises OpError for a head size that the kernels do not take."""
    if D not in HEAD_DIMS:
        raise OpError(f"attention: D = {D} is neither a multiple of 8 up to 256, nor of 16 up to 512")


def _constants(call: Call) -> dict[str, Any]:
    """What kernels are compiled for: whether scores have a soft limit, and whether heads have sinks; and how many heads
    are in a row of x, those that attention over a cache does not read included."""
    x = call.arrays["x"]
    assert x is not None
    return {"CAPPED": call["softcap"] != 0, "SINKS": call.arrays["sinks"] is not None, "heads": x.shape[1] // call["D"]}


# attention_decode.cu. A sequence's keys are divided into splits, one for a block at a time.
# Query heads that a block takes: as registers hold sums, by multiply-adds fewer of more than 256 dims.
_MAX_HEADS, _MAX_WIDE_HEADS = 8, 4
_MAX_SPLITS = 64  # of a sequence, however long it is: the block that arrives last adds them all up
# A large batch has more work than fits on the GPU at once. Its grid has 8 times as many blocks as the GPU holds, so
# that multiprocessors that are done early find more to do.
_BLOCKS_PER_PLACE = 8


def decode_plan(kernel: str, call: Call, device: Device, **constants: Any) -> Plan:
    """The launch of a kernel of attention_decode.cu: one new token per sequence.

    The GPU, which knows the seq_lens, divides a sequence's keys into splits: of at least ``min_keys`` keys, and at most
    ``max_splits``; up to ``alone`` keys are one. The grid depends on the size of the batch and of the page table alone.
    """
    b, num_heads, H, D = (call[name] for name in ("b", "num_heads", "H", "D"))
    check_head(D)
    T, C = (call.dtypes[name].itemsize for name in ("T", "C"))
    tensor = on_tensor_cores(D, T, C, device)
    parts = -(-num_heads // H // (_MAX_HEADS if D <= 256 or tensor else _MAX_WIDE_HEADS))
    Q = -(-num_heads // H // parts)
    found = decode_blocks(b * H * parts, Q, D, C, device, tensor)
    warps, min_keys, stages, places, alone = found
    resident = device.sms * places  # blocks that the GPU holds at once
    max_splits = max(1, min(_MAX_SPLITS, resident // (H * parts)))
    keys = call["M"] * call["S"]
    if call["window"]:
        keys = min(keys, call["window"] + 15)  # a tile of 16 keys may begin before the window
    splits = max(1, min(max_splits, -(-keys // min_keys))) if keys > alone else 1
    blocks = max(1, min(splits, _BLOCKS_PER_PLACE * resident // (H * parts * b)))
    constants |= {
        "Q": Q, "WARPS": warps, "TENSOR": tensor, "STAGES": stages, "BLOCKS": places,
        "min_keys": min_keys, "alone": alone, "max_splits": max_splits, "splits": splits, **_constants(call),
    }  # fmt: skip
    scratch = {
        "partial": ((b, num_heads, splits, D), "f32"),
        "stats": ((b, num_heads, splits, 2), "f32"),
        "arrivals": ((b, H * parts), "u32"),
    }
    room = room_bytes(found, Q, D, C)
    launch = Launch(f"attention_decode.cu:{kernel}", (blocks, H * parts, b), (32 * warps,), room, constants=constants)
    return Plan((launch,), scratch, frozenset({"arrivals"}))


def _on_tensor_cores(call: Call, device: Device, S: int) -> bool:
    """They multiply 16-bit numbers, and their tiles of keys are whole pages or parts of one. The sums of more than 256
    columns do not fit into registers."""
    fits = call.dtypes["T"].itemsize == 2 and call["D"] <= 256
    return device.arch >= 80 and fits and S not in range(1, 8) and S & (S - 1) == 0


def _prefill(call: Call, device: Device) -> Plan:
    launch = prefill_launch(call, device, call["S"], lse=None)
    wide = call.dtypes["C"] != call.dtypes["T"] and _on_tensor_cores(call, device, call["S"])
    return _widened(call, launch) if wide else Plan((launch,))


def prefill_launch(call: Call, device: Device, S: int, **more: Any) -> Launch:
    """Any number of new tokens per sequence, in tiles of (token, head) pairs by keys.

    S: tokens of a page, or 0 where keys and values are rows of x; more: constants of the launch.
    """
    n, b, num_heads, H, D = (call[name] for name in ("n", "b", "num_heads", "H", "D"))
    check_head(D)
    rows = n * (num_heads // H)
    tensor = _on_tensor_cores(call, device, S)
    if tensor and device.arch == 90 and D in (64, 96, 128):
        groups = 3 if D == 64 else 2  # warpgroups of 64 rows; three where registers allow it
        shared = 1024 + 2 * (-(-D // 64) * 64) * (64 * groups + 4 * 128)
        name = "attention_prefill_wgmma.cu:attention_prefill_wgmma"
        grid, threads, constants = ((rows // (64 * groups) + b) * H, 1), 128 * groups + 128, {"GROUPS": groups}
    elif tensor:
        # 128 rows are faster once there are some four blocks for each multiprocessor; 64 share out fewer rows better.
        many = rows * H >= 4 * 128 * device.sms and not device.deterministic
        ROWS = 128 if D <= 128 and many else 64
        # What fits into registers; D = 96 and 128 with 64 keys only as the compiler allots them before sm_100, and 128
        # not with rows of x, where addresses take one more.
        KEYS = 64 if D <= 64 or (D in ((96, 128) if S else (96,)) and device.arch <= 90) else 32
        shared = 2 * (-(-D // 16) * 16) * (ROWS + 4 * KEYS)
        name = "attention_prefill_mma.cu:attention_prefill_mma"
        grid, threads, constants = ((rows // ROWS + b) * H, 1), 128, {"ROWS": ROWS, "KEYS": KEYS}
    else:
        # At most 60 KiB of shared memory: sm_75 has 64. It has too little for D > 480.
        ROWS, KEYS = (64, 32) if D <= 128 else (32, 16) if D <= 256 else (16, 16)
        shared = 4 * ((ROWS + KEYS) * (-(-D // 32) * 32 + 4) + ROWS * (KEYS + 4))
        name = "attention_prefill_fma.cu:attention_prefill_fma"
        grid, threads, constants = (rows // ROWS + b, H), 256, {"ROWS": ROWS, "KEYS": KEYS}
    return Launch(name, grid, (threads,), shared, constants={**constants, **_constants(call), "S": S, **more})


_WIDEN_THREADS = 256


def _widened(call: Call, launch: Launch) -> Plan:
    """The launch on pages in the model's dtype: those that the sequences use, under the numbers that they have in the
    cache. All layers and passes share these pages, as many as the cache has."""
    P, H, S, D = (call[name] for name in ("P", "H", "S", "D"))
    grid = (call["M"] * H, call["b"])
    widen = Launch("attention_pages.cu:widen_pages", grid, (_WIDEN_THREADS,))
    pages = ((P, H, S, D), dtype_name(call.dtypes["T"]))
    scratch = {"wide_k": pages, "wide_v": pages}
    on_wide = replace(launch, names={"k": "wide_k", "v": "wide_v"})
    return Plan((widen, on_wide), scratch, shared=frozenset(scratch))


attention = Op(
    "attention",
    "y[n,num_heads*D]:T = (x[n,w]:T, k[P,H,S,D]:C, v[P,H,S,D]:C, cu_seqlens[b+1]:i32, seq_lens[b]:i32,"
    " page_table[b,M]:i32, sinks[num_heads]:T?, num_heads:i32, window:i32, scale:f32, softcap:f32=0)",
    doc="y = softmax(q k^T * scale) v per head. A row of x begins with its queries; what is behind them is not read."
    " Sequence i owns rows cu_seqlens[i]..cu_seqlens[i+1] of x, the last of its seq_lens[i] tokens; its keys lie on"
    " pages page_table[i]. A query sees itself and what came before, the last `window` tokens only if window > 0. Rows"
    " that belong to no sequence are not computed. n = b is a decode step: a row each. D: a multiple of 8 up to 256, or"
    " of 16 up to 512. softcap, if not 0: scores s = q k^T * scale become softcap * tanh(s / softcap). sinks: of each"
    " head one more logit of the softmax, without a value.",
    reference=_attention,
    kernels=_kernels,
    kernel_docs={
        "attention_decode": "Attention of one new token per sequence; blocks share out the sequence's keys.",
        "widen_pages": "The pages of an e4m3 cache in the model's dtype, for attention of many new tokens.",
        "attention_prefill_wgmma": "Attention of many new tokens, on Hopper's tensor cores (wgmma).",
        "attention_prefill_mma": "Attention of many new tokens, on tensor cores (mma.sync).",
        "attention_prefill_fma": "Attention of many new tokens by multiply-adds: float32, before sm_80, heads > 256.",
    },
    cases=CASES,
    sizes=random_sequences,
    # The decode kernel is that of append_attention's cases; it comes by itself with the known models' last rows.
    compiled=lambda case: well_known(case) and case["n"] > case["b"],
    inputs=attention_inputs,
    shape=DEFAULT_SIZES,
    rules=("num_heads % H == 0", "num_heads * D <= w", "w % D == 0", "new <= length"),
    complete=equal_sequences,
    tolerance={"f32": 60.0},  # sums over thousands of keys, one after the other: see PRODUCT_TOLERANCE
    bytes=_bytes,
    flops=lambda c: 4 * c["num_heads"] * c["D"] * _pairs(c),
    unaligned=False,
)
