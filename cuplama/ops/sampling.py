"""From logits to a token. Kernels: cuda_src/sampling.cu.

Randomness is counter-based: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
The draw is a Gumbel maximum (Gumbel 1954; Maddison et al., arXiv:1411.0030): the token with the largest
``logit / temperature + g``. Every token has its own random number, so the draw needs no sorted or summed
probabilities, and it is the same alone, in a batch, and on every backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError

__all__ = ["count_token", "gumbel", "logprobs", "penalize", "philox", "sample"]

_MASS = 2.0**32  # probabilities as integers, so that their sums do not depend on the order


def philox(counter: Array, key: int) -> Array:
    """Philox 4x32-10. counter: [..., 4] uint32; key: 64 bits. Returns [..., 4] uint32."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


def gumbel(ids: Array, seed: int, position: int) -> Array:
    """Standard Gumbel noise, float32, for the given token ids at one position.

    Token id has word ``id % 4`` of the Philox block with counter (id // 4, position, 0, 0) and key ``seed``.
    ``u = (word + 1/2) / 2^32`` in float32; g = -log(-log(1 - u)), written with log1p so that the upper tail, which
    decides the draw, is resolved to 2^-33.
    """
    block, at = np.unique(ids // 4, return_inverse=True)
    counter = np.zeros((len(block), 4), np.uint32)
    counter[:, 0], counter[:, 1] = block, position
    word = philox(counter, seed)[at, ids % 4]
    u = (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    with np.errstate(divide="ignore"):
        return -np.log(-np.log1p(-u))


def _penalize(
    logits: Array,
    seen: Array,
    bias: Array | None,
    stop_ids: Array,
    positions: Array,
    min_positions: Array,
    repetition: Array,
    presence: Array,
    frequency: Array,
) -> Array:
    y = logits.copy()
    for i in range(len(y)):
        if repetition[i] != 1:
            row = y[i]
            y[i] = np.where(seen[i] > 0, np.where(row > 0, row / repetition[i], row * repetition[i]), row)
        if presence[i] or frequency[i]:
            count = (seen[i] >> 1).astype(y.dtype)  # float32 arithmetic throughout, as on every backend
            y[i] -= presence[i] * (count > 0) + frequency[i] * count
        if bias is not None:
            y[i] += bias[i]
        if positions[i] < min_positions[i]:
            y[i, stop_ids[i][stop_ids[i] >= 0]] = -np.inf
    return y


def _sample(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, seed: Array, positions: Array
) -> Array:
    tokens = np.empty(len(logits), np.int32)
    for i, row in enumerate(logits):
        if not np.isfinite(row.max()):  # NaN if there is one
            tokens[i] = -1
            continue
        if temperature[i] == 0:
            tokens[i] = row.argmax()
            continue
        z = ((row - row.max()) / temperature[i]).astype(np.float32)
        ids = np.flatnonzero(z > -np.inf)
        if 0 < top_k[i] < len(ids):
            ids = ids[z[ids] >= np.partition(z[ids], -top_k[i])[-top_k[i]]]
        if top_p[i] < 1:
            order = ids[np.argsort(-z[ids], kind="stable")]
            mass = np.rint(np.exp(z[order]).astype(np.float64) * _MASS).astype(np.uint64)
            # The mass strictly above a token: equal logits stand or fall together.
            start = np.searchsorted(-z[order], -z[order], side="left")
            above = np.concatenate([[np.uint64(0)], np.cumsum(mass)])[start]
            ids = order[(above == 0) | (above < np.float64(top_p[i]) * np.float64(mass.sum()))]
        if min_p[i] > 0:
            ids = ids[np.exp(z[ids]) >= min_p[i]]
        ids = np.sort(ids)
        tokens[i] = ids[np.argmax(z[ids] + gumbel(ids, int(seed[i]), int(positions[i])))]
    return tokens


def _count_token(seen: Array, token: Array) -> Array:
    drawn = np.flatnonzero(token >= 0)
    seen[drawn, token[drawn]] += 2
    return seen


def _logprobs(logits: Array, token: Array, *, N: int) -> tuple[Array, Array, Array]:
    z = logits - logits.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z.astype(np.float64)).sum(-1, keepdims=True)).astype(z.dtype)
    chosen = logp[np.arange(len(token)), np.maximum(token, 0)]
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :N].astype(np.int32)
    return chosen, ids, np.take_along_axis(logp, ids, -1)


def _penalize_inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    b, v, m = case["b"], case["V"], case["m"]
    return {
        "seen": rng.choice([0, 0, 0, 1, 2, 3, 7], (b, v)).astype(np.int32),
        "stop_ids": rng.integers(-1, v, (b, m)).astype(np.int32),
        "positions": rng.integers(0, 9, b).astype(np.int32),
        "min_positions": rng.integers(0, 9, b).astype(np.int32),
        "repetition": rng.choice([1.0, 1.3, 0.8], b).astype(np.float32),
        "presence": rng.choice([0.0, 0.5, -0.5], b).astype(np.float32),
        "frequency": rng.choice([0.0, 0.25], b).astype(np.float32),
    }


def _sample_inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    b, v = case["b"], case["V"]
    logits = (4 * rng.standard_normal((b, v))).astype(np.float32)
    if case.get("ties"):
        logits = np.round(logits)
    if case.get("near"):  # all in one bin of the kernel's histogram, and too many for its list
        logits = (1e-3 * rng.standard_normal((b, v))).astype(np.float32)
    if case.get("holes"):
        logits[rng.random((b, v)) < 0.5] = -np.inf
        logits[:, 0] = 0
    if case.get("broken"):  # one row each way, and one that is not
        logits[0, v // 2], logits[1, v - 1], logits[2] = np.nan, np.inf, -np.inf
        logits[3, 1], logits[3, 2] = np.inf, np.nan
    return {
        "logits": logits,
        "temperature": rng.choice(np.array([1.0] if case.get("near") else [0.0, 0.5, 1.0, 1.7], np.float32), b),
        "top_k": rng.choice(np.array([0, 1, 5, 40, v, v + 7], np.int32), b),
        "top_p": rng.choice(np.array([1.0, 0.95, 0.5, 0.0], np.float32), b),
        "min_p": rng.choice(np.array([0.0, 0.05, 1.0], np.float32), b),
        "seed": rng.integers(0, 2**64, b, dtype=np.uint64),
        "positions": rng.integers(0, 2**31, b).astype(np.int32),
    }


def _with_none(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    token = rng.integers(0, case["V"], case["b"]).astype(np.int32)
    token[1:2] = -1
    return {"token": token}


_SHAPES = [dict(b=1, V=7), dict(b=3, V=512), dict(b=2, V=4099)]

_THREADS, _CHUNK, _BINS = 256, 2048, 2048  # as in sampling.cu
_MAX_CHUNKS = 1024  # of a row of logits: what one block of logprobs_merge takes


def _sizes(draw: Draw) -> dict[str, Any]:
    return dict(b=draw(1, 4), V=draw(21, 3000), m=draw(1, 3), bias=bool(draw(0, 1)), N=draw(0, 20))


def _penalize_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("sampling.cu:penalize", (-(-call["V"] // _THREADS), call["b"]), (_THREADS,)),))


def _sample_kernels(call: Call, device: Device) -> Plan:
    b, V = call["b"], call["V"]
    chunks = -(-V // _CHUNK)
    grid, block = (chunks, b), (_THREADS,)
    return Plan(
        (
            Launch("sampling.cu:sample_max", grid, block),
            Launch("sampling.cu:sample_histogram", grid, block),
            Launch("sampling.cu:sample_threshold", (b,), (1024 if chunks > 4 else 256,), constants={"chunks": chunks}),
            Launch("sampling.cu:sample_draw", grid, block),
        ),
        {
            "chunk_max": ((b, chunks), "f32"),
            "counts": ((b, _BINS), "u64"),
            "masses": ((b, _BINS), "u64"),
            "threshold": ((b,), "u32"),
            "best": ((b,), "u64"),
            "finished": ((b,), "u32"),
        },
    )


def _count_token_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("sampling.cu:count_token", (-(-call["b"] // _THREADS),), (_THREADS,)),))


def _logprobs_kernels(call: Call, device: Device) -> Plan:
    b, V, N = call["b"], call["V"], call["N"]
    chunks = -(-V // _CHUNK)
    if chunks > _MAX_CHUNKS:
        raise OpError(f"logprobs: a vocabulary of {V} is more than the {_MAX_CHUNKS * _CHUNK} that the kernel merges")
    return Plan(
        (
            Launch("sampling.cu:logprobs_chunk", (chunks, b), (_THREADS,)),
            Launch("sampling.cu:logprobs_merge", (b,), (-(-chunks // 32) * 32,), constants={"chunks": chunks}),
        ),
        {
            "chunk_max": ((b, chunks), "f32"),
            "chunk_sum": ((b, chunks), "f32"),
            "largest": ((b, chunks, max(N, 1)), "u64"),
        },
    )


penalize = Op(
    "penalize",
    "y[b,V]:f32 = (logits[b,V]:f32, seen[b,V]:i32, bias[b,V]:f32?, stop_ids[b,m]:i32, positions[b]:i32,"
    " min_positions[b]:i32, repetition[b]:f32, presence[b]:f32, frequency[b]:f32)",
    doc="Logits with the penalties for tokens that occurred, and with a bias."
    " seen = 2 * (times generated) + (1 if in the prompt). Where seen > 0 a positive logit is"
    " divided and a negative one multiplied by `repetition`; where generated, `presence` and count * `frequency` are"
    " subtracted; then the bias is added; stop_ids (-1: none) cannot be drawn while positions < min_positions.",
    reference=_penalize,
    kernels=_penalize_kernels,
    cases=[{**s, "m": m, "bias": bias} for s, m, bias in zip(_SHAPES, (1, 3, 2), (True, False, True), strict=True)],
    sizes=_sizes,
    inputs=_penalize_inputs,
    shape={"b": 1, "V": 128256, "m": 2, "bias": True},
)

sample = Op(
    "sample",
    "token[b]:i32 = (logits[b,V]:f32, temperature[b]:f32, top_k[b]:i32, top_p[b]:f32, min_p[b]:f32, seed[b]:u64,"
    " positions[b]:i32)",
    doc="Draws a token. temperature 0: the largest logit, the lowest id of equals. Otherwise z = (logit - max) /"
    " temperature; top_k > 0 keeps z >= the k-th largest; top_p < 1 keeps a token if the probability of the tokens"
    " with larger z is < top_p (the largest always); min_p > 0 keeps probability >= min_p * the largest; the token"
    " with the largest z + g among the kept is drawn, g the Gumbel noise of (seed, position, token id). -1 if a logit"
    " is NaN or +infinity, or if all are -infinity.",
    reference=_sample,
    kernels=_sample_kernels,
    kernel_docs={
        "sample_max": "The maximum of each chunk of the logits; -1 for a row that holds no number.",
        "sample_histogram": "How many tokens of a row, and how much probability, lie in each range of logits.",
        "sample_threshold": "The lowest logit that top_k, top_p and min_p keep.",
        "sample_draw": "Draws the kept token with the largest logit / temperature + Gumbel noise.",
    },
    cases=[
        *({**s, "trial": t} for s in _SHAPES for t in range(4)),
        *(dict(b=4, V=300, ties=True, trial=t) for t in range(4)),
        *(dict(b=4, V=1000, holes=True, trial=t) for t in range(2)),
        *(dict(b=5, V=3000, broken=True, trial=t) for t in range(3)),
        dict(b=6, V=9001, near=True),
        dict(b=6, V=20000),
    ],
    sizes=_sizes,
    unaligned=False,
    inputs=_sample_inputs,
)

count_token = Op(
    "count_token",
    "seen[b,V]:i32 = (seen[b,V]:i32, token[b]:i32)",
    doc="seen[i, token[i]] += 2, unless the token is -1",
    reference=_count_token,
    kernels=_count_token_kernels,
    cases=_SHAPES,
    sizes=_sizes,
    ranges={"seen": "8+0*b"},
    inputs=_with_none,
    shape={"b": 1, "V": 128256},
    bytes=lambda c: 12 * c["b"],
)

logprobs = Op(
    "logprobs",
    "logprob[b]:f32, top_ids[b,N]:i32, top_logprobs[b,N]:f32 = (logits[b,V]:f32, token[b]:i32, N:i32)",
    doc="Log-softmax of the raw logits: of the token drawn (of 0 for -1, which is none), and the N largest (the lowest"
    " id first among equals).",
    reference=_logprobs,
    kernels=_logprobs_kernels,
    cases=[{**s, "N": n} for s, n in zip(_SHAPES, (0, 5, 20), strict=True)],
    sizes=_sizes,
    inputs=_with_none,
    shape={"b": 1, "V": 128256, "N": 5},
    rules=("N <= V",),
    kernel_docs={
        "logprobs_chunk": "The maximum, the sum of exponentials and the N largest of each chunk of the logits.",
        "logprobs_merge": "The log-softmax of a row's token and of its N largest logits, from what its chunks gave.",
    },
    unaligned=False,
)
