"""Cases of attention: sequences of given lengths on pages of a cache, and those that its ops are tested with always."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, narrow
from .op import Draw, case_dtype

__all__ = [
    "CASES",
    "DEFAULT_SIZES",
    "attention_case",
    "attention_inputs",
    "equal_sequences",
    "random_sequences",
    "random_sinks",
    "well_known",
]


def random_sinks(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> Array:
    """Sinks [num_heads] that weigh about as much as some fifty keys, so that a result shows whether they are there."""
    return narrow((4 + rng.standard_normal(case["num_heads"])).astype(np.float32), T)


def attention_inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
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

# Decode steps of heads of more than 128, whose tiles always go through shared memory: groups of 1, 2, 6 and 8 heads,
# several splits, a window, heads that fill no whole chunk, pages that are no whole tiles, e4m3 caches whose rows can be
# copied 16 bytes at a time and one whose rows cannot; then as many sequences as each number of warps is for.
_RING_CASES = (
    attention_case(1, 1, 256, [1], [1], S=64),
    attention_case(2, 1, 256, [1], [300], S=64),
    attention_case(12, 2, 192, [1, 1], [17, 128], S=64),
    attention_case(8, 1, 256, [1, 1], [97, 600], 400, S=64, sinks=True),
    attention_case(4, 2, 152, [1, 1], [40, 33], S=8),
    attention_case(8, 1, 256, [1, 1], [290, 48], S=64, C="e4m3"),
    attention_case(6, 1, 192, [1, 1], [64, 40], 20, S=64, C="e4m3"),
    attention_case(4, 2, 144, [1, 1], [40, 17], S=8, C="e4m3"),
    attention_case(2, 1, 136, [1, 1], [40, 17], S=64, C="e4m3"),
    attention_case(4, 2, 512, [1], [270], S=64, C="e4m3", softcap=1.5),
    attention_case(2, 2, 256, [1] * 16, [*_LENGTHS[:15], 270], S=64),
    attention_case(5, 5, 256, [1] * 27, [*_LENGTHS[:26], 100], S=64),
    attention_case(16, 16, 256, [1] * 32, [1, 16, 17, 33] * 8, S=16),
    attention_case(32, 32, 256, [1] * 32, [1, 17, 16, 5] * 8, S=16),
)

CASES = (
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
    *_RING_CASES,  # behind the others, since append_attention's cases go by their numbers
)
"""The cases of ``attention``; those of append_attention are its decode steps."""
