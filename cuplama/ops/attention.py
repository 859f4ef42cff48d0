"""Causal grouped-query attention over the paged cache. Kernels: cuda_src/attention_decode.cu for one new token of each
sequence; attention_prefill_wgmma.cu, attention_prefill_mma.cu or attention_prefill_fma.cu for many, by what the GPU and
the dtype allow.

Grouped queries: Ainslie et al., arXiv:2305.13245. Online softmax: Milakov & Gimelshein, arXiv:1805.02867;
tiling: Dao, "FlashAttention-2", arXiv:2307.08691; Shah et al., "FlashAttention-3", arXiv:2407.08608.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name, narrow, upcast
from .decode_blocks import TILE, decode_blocks
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op, case_dtype
from .signature import OpError
from .softmax import capped, softmax
from .team import fill

__all__ = [
    "DEFAULT_SIZES",
    "HEAD_DIMS",
    "attention",
    "attention_case",
    "check_head",
    "decode_plan",
    "equal_sequences",
    "prefill_launch",
    "random_sequences",
    "random_sinks",
    "well_known",
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


def random_sinks(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> Array:
    """Sinks [num_heads] that weigh about as much as some fifty keys, so that a result shows whether they are there."""
    return narrow((4 + rng.standard_normal(case["num_heads"])).astype(np.float32), T)


def _inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    """Sequences of the case's seq_lens, each on pages drawn at random from the pool.

    A kernel that uses what it must not is caught: table entries past the end point at a page that does not exist, and
    what no sequence has of the cache is NaN.
    """
    new, seq_lens, size = np.array(case["new"]), np.array(case["seq_lens"]), case["S"]
    need = -(-seq_lens // size)
    pool = rng.permutation(case["P"])
    page_table = np.full((len(seq_lens), case["M"]), 2**30, np.int32)
    unused = np.ones((case["P"], size), bool)
    for i, (count, length) in enumerate(zip(need, seq_lens, strict=True)):
        page_table[i, :count], pool = pool[:count], pool[count:]
        token = np.arange(length)
        unused[page_table[i, token // size], token % size] = False
    shape = (case["P"], case["H"], size, case["D"])
    C = case_dtype("C", case, T)
    cache = {name: narrow(rng.standard_normal(shape).astype(np.float32), C) for name in ("k", "v")}
    for array in cache.values():
        array.swapaxes(1, 2)[unused] = np.nan
    return {
        **cache,
        "sinks": random_sinks(rng, case, T),
        "cu_seqlens": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        "seq_lens": seq_lens.astype(np.int32),
        "page_table": page_table,
    }


def attention_case(
    num_heads: int, H: int, D: int, new: list[int], seq_lens: list[int], window: int = 0, S: int = 16, C: str = "T",
    softcap: float = 0.0, sinks: bool = False, queries: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A case with sequences of ``seq_lens`` tokens, the last ``new`` of each new, on pages of ``S`` tokens. C: what the
    cache holds, "T" or "e4m3"; queries: whether rows of x have queries alone."""
    need = [-(-length // S) for length in seq_lens]
    return dict(
        n=sum(new), b=len(new), num_heads=num_heads, H=H, D=D, new=new, seq_lens=seq_lens, window=window, S=S,
        P=sum(need) + 1, M=max(need) + 1, scale=D**-0.5, C=C, softcap=softcap, sinks=sinks,
        w=(num_heads + (0 if queries else 2 * H)) * D,
    )  # fmt: skip


DEFAULT_SIZES: Mapping[str, Any] = dict(num_heads=32, H=8, D=128, b=1, length=512, new=1, window=0, S=64, C="T")
"""Sequences of one length, as people ask for them: ``b`` of ``length`` tokens, of which ``new`` are new."""


def equal_sequences(s: Mapping[str, Any]) -> dict[str, Any]:
    """The case of sequences of one length: from the names of ``DEFAULT_SIZES``."""
    new, seq_lens = [s["new"]] * s["b"], [s["length"]] * s["b"]
    return attention_case(s["num_heads"], s["H"], s["D"], new, seq_lens, s["window"], s["S"], s["C"])


def random_sequences(draw: Draw) -> dict[str, Any]:
    """A random case: up to three sequences, each with one or two new tokens or with many."""
    H, D = draw(1, 4), 8 * draw(1, 32) if draw(0, 3) else 16 * draw(17, 30)
    new = [draw(1, 2) if draw(0, 1) else draw(1, 70) for _ in range(draw(1, 3))]
    seq_lens = [n + draw(0, 90) for n in new]
    window, S, C = draw(0, 1) * draw(1, 60), 8 * draw(1, 8), "e4m3" if draw(0, 1) else "T"
    group, softcap, sinks = draw(1, 5), draw(0, 1) * 0.25 * draw(1, 9), bool(draw(0, 1))
    return attention_case(H * group, H, D, new, seq_lens, window, S, C, softcap, sinks, bool(draw(0, 1)))


_PAGE = 64  # tokens of a page, as the engine has them


def well_known(case: Mapping[str, Any]) -> bool:
    """Whether published models have such a case: ``Op.compiled`` of attention's ops.

    Head sizes as in Llama 3.2 and gpt-oss, Phi-2, Phi-3, Llama 3 and Qwen 3, Gemma, Gemma 4. No model has soft limits
    and sinks, and e4m3 caches come with the known models, in each one's own dtype.
    """
    odd = (case["softcap"] and case["sinks"]) or case.get("C") == "e4m3" or case.get("S", _PAGE) != _PAGE
    return case["D"] in (64, 80, 96, 128, 256, 512) and not odd


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
_MAX_HEADS, _MAX_WIDE_HEADS = 8, 4  # query heads that a block takes, up to D = 256 and beyond: as registers hold sums
_MAX_SPLITS = 64  # of a sequence, however long it is: the block that arrives last adds them all up
# A large batch has more work than fits on the GPU at once. Its grid has 8 times as many blocks as the GPU holds, so
# that multiprocessors that are done early find more to do.
_BLOCKS_PER_PLACE = 8


def decode_plan(kernel: str, call: Call, device: Device, **constants: Any) -> Plan:
    """The launch of a kernel of attention_decode.cu: one new token per sequence.

    The GPU, which knows the seq_lens, divides a sequence's keys into splits: of at least ``min_keys`` keys, and at most
    ``max_splits``. The grid depends on the size of the batch and of the page table alone.
    """
    b, num_heads, H, D = (call[name] for name in ("b", "num_heads", "H", "D"))
    check_head(D)
    parts = -(-num_heads // H // (_MAX_HEADS if D <= 256 else _MAX_WIDE_HEADS))
    tensor = device.arch >= 80 and call.dtypes["T"].itemsize == 2 and D <= 128  # more would not fit into registers
    warps, min_keys, stages, places = decode_blocks(b * H * parts, D * call.dtypes["C"].itemsize, device, tensor)
    resident = device.sms * places  # blocks that the GPU holds at once
    max_splits = max(1, min(_MAX_SPLITS, resident // (H * parts)))
    keys = call["M"] * call["S"]
    if call["window"]:
        keys = min(keys, call["window"] + 15)  # a tile of 16 keys may begin before the window
    splits = max(1, min(max_splits, -(-keys // min_keys)))
    blocks = max(1, min(splits, _BLOCKS_PER_PLACE * resident // (H * parts * b)))
    constants |= {
        "Q": -(-num_heads // H // parts), "WARPS": warps, "TENSOR": tensor, "STAGES": stages, "BLOCKS": places,
        "min_keys": min_keys, "max_splits": max_splits, "splits": splits, **_constants(call),
    }  # fmt: skip
    scratch = {
        "partial": ((b, num_heads, splits, D), "f32"),
        "stats": ((b, num_heads, splits, 2), "f32"),
        "arrivals": ((b, H * parts), "u32"),
    }
    ring = warps * stages * 2 * TILE * D * call.dtypes["C"].itemsize
    launch = Launch(f"attention_decode.cu:{kernel}", (blocks, H * parts, b), (32 * warps,), ring, constants=constants)
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


# The knobs of Gemma 2 (soft limits) and of gpt-oss (sinks), and both: decode steps with several splits, then prompts.
_KNOBS_CASES = (
    attention_case(4, 2, 256, [1], [90], S=64, softcap=1.5),
    attention_case(16, 2, 64, [1, 1], [20, 600], 400, S=64, sinks=True),
    attention_case(4, 2, 128, [1, 1], [300, 40], S=64, C="e4m3", softcap=1.5, sinks=True),
    attention_case(2, 1, 256, [20], [30], S=64, softcap=1.5),
    attention_case(8, 1, 64, [30, 3], [100, 3], 50, S=64, sinks=True),
    attention_case(2, 1, 128, [33], [140], 100, S=64, softcap=1.5, sinks=True),
)

# Heads of more than 256, as Gemma 4's layers without a window have them.
_WIDE_CASES = (
    attention_case(8, 1, 512, [1, 1], [90, 5], S=64),
    attention_case(5, 1, 272, [1], [40], 20, S=64, C="e4m3"),
    attention_case(2, 1, 480, [20, 1], [70, 33], S=64),
    attention_case(3, 1, 400, [9], [9], S=8, C="e4m3"),
)

# With an e4m3 cache: each way that decode reads its rows (16 or 8 numbers at a time, keys and values), then prefill.
_E4M3_CASES = (
    attention_case(32, 8, 128, [1], [300], 0, 64, C="e4m3"),
    attention_case(7, 1, 64, [1, 1], [513, 64], 0, 64, C="e4m3"),
    attention_case(6, 2, 80, [1, 1], [100, 33], 20, 64, C="e4m3"),
    attention_case(4, 2, 96, [1, 1, 1], [1, 16, 37], 0, 8, C="e4m3"),
    attention_case(3, 1, 256, [1, 1], [70, 9], 0, 64, C="e4m3"),
    attention_case(44, 44, 8, [1], [800], 0, 64, C="e4m3"),
    attention_case(8, 1, 128, [1], [2100], 65, 64, C="e4m3"),
    attention_case(4, 2, 64, [33, 1, 7], [33, 40, 12], C="e4m3"),
    attention_case(6, 3, 40, [9, 20], [50, 20], 7, 8, C="e4m3"),
    attention_case(4, 1, 128, [33, 31], [64, 129], 0, 64, C="e4m3"),
    attention_case(4, 1, 256, [17, 40], [33, 95], 33, 32, C="e4m3"),
    attention_case(3, 1, 64, [100, 5], [300, 520], 200, 32, C="e4m3"),
)

# As many sequences and key heads as send tiles through shared memory: each number of stages, rows whose 16-byte parts
# are exchanged and others, a sequence of two splits, windows, pages that are no whole tiles.
_LENGTHS = [1, 16, 17, 70] * 8
_BATCH_CASES = (
    attention_case(4, 4, 64, [1] * 32, [1100, *_LENGTHS[1:]], S=64),
    attention_case(8, 4, 80, [1] * 32, _LENGTHS, 20, S=64, softcap=1.5),
    attention_case(16, 16, 16, [1] * 32, _LENGTHS, S=64, sinks=True),
    attention_case(32, 32, 8, [1] * 32, _LENGTHS, S=8),
    attention_case(8, 4, 128, [1] * 32, _LENGTHS, 40, S=64, C="e4m3"),
    attention_case(16, 16, 64, [1] * 32, _LENGTHS, S=64, C="e4m3"),
)

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
    cases=[
        attention_case(4, 2, 64, [1], [1]),
        attention_case(4, 2, 64, [1], [37]),
        attention_case(1, 1, 8, [1, 1, 1], [5, 16, 17]),
        attention_case(6, 2, 80, [1, 1], [100, 33], window=20, S=64),
        attention_case(8, 8, 128, [1], [130], S=64),
        attention_case(32, 8, 128, [1], [300], S=64),
        attention_case(3, 1, 256, [1, 1], [70, 9], S=64),
        attention_case(7, 1, 64, [1, 1], [513, 64], S=64),
        attention_case(16, 1, 32, [1], [90], S=64),
        attention_case(18, 2, 24, [1, 1], [20, 70], window=65),
        attention_case(2, 1, 16, [1, 1], [4500, 8300], S=64),
        attention_case(4, 4, 16, [5], [5]),
        attention_case(4, 2, 64, [33, 1, 7], [33, 40, 12]),
        attention_case(2, 1, 96, [70], [70], window=16),
        attention_case(6, 3, 40, [9, 20], [50, 20], window=7, S=8),
        attention_case(4, 1, 128, [65, 64], [65, 128], S=64),
        # tensor cores: tiles of 64 to 192 rows by 32 to 128 keys
        attention_case(4, 1, 128, [33, 31], [64, 129], S=64),
        attention_case(7, 1, 64, [19, 1, 2], [65, 130, 64], S=128),
        attention_case(2, 2, 128, [130], [193], window=65, S=16),
        attention_case(1, 1, 96, [128, 3], [128, 67], window=64, S=64),
        attention_case(3, 1, 8, [100], [200], window=30, S=8),
        attention_case(4, 2, 80, [65], [127], window=128, S=32),
        attention_case(4, 1, 256, [17, 40], [33, 95], window=33, S=32),
        attention_case(2, 1, 200, [33], [64], S=8),
        attention_case(4, 1, 128, [20], [600], S=64),
        attention_case(3, 1, 64, [100, 5], [300, 520], window=200, S=32),
        # seq_lens that end with a page, but not with a tile of keys
        attention_case(4, 2, 64, [48], [48], 0, 16),
        attention_case(4, 2, 40, [48], [48], 0, 16),
        attention_case(1, 1, 40, [20], [69]),  # a warp's last token is the first key of a tile
        attention_case(4, 2, 64, [1, 1], [24, 40], S=8),
        # decode: splits of more than two tiles for a warp; more splits than a thread adds up at once
        attention_case(44, 44, 8, [1], [800], S=64),
        attention_case(8, 1, 128, [1], [2100], S=64),
        *_KNOBS_CASES,
        *_WIDE_CASES,
        *_E4M3_CASES,
        *_BATCH_CASES,
        # rows of queries alone, by each kernel
        attention_case(6, 2, 64, [1, 1], [20, 300], S=64, queries=True),
        attention_case(4, 1, 128, [33, 31], [64, 129], S=64, queries=True),
        attention_case(6, 2, 256, [3, 20], [40, 20], window=30, S=16, queries=True),
    ],
    sizes=random_sequences,
    # The decode kernel is that of append_attention's cases; it comes by itself with the known models' last rows.
    compiled=lambda case: well_known(case) and case["n"] > case["b"],
    inputs=_inputs,
    shape=DEFAULT_SIZES,
    rules=("num_heads % H == 0", "num_heads * D <= w", "w % D == 0", "new <= length"),
    complete=equal_sequences,
    tolerance={"f32": 60.0},  # sums over thousands of keys, one after the other: see PRODUCT_TOLERANCE
    bytes=_bytes,
    flops=lambda c: 4 * c["num_heads"] * c["D"] * _pairs(c),
    unaligned=False,
)
