"""The gated delta rule: linear attention whose state forgets and corrects itself. Kernels: cuda_src/gated_delta.cu and,
for prompts, gated_delta_chunks.cu.

Yang, Kautz & Hatamizadeh, "Gated Delta Networks", arXiv:2412.06464.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, narrow, upcast
from .causal_conv import equal_sequences, random_sequences, random_state, sequence_inputs, stateful_case
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError

__all__ = ["gated_delta"]

_EPS = 1e-6  # of the L2 norm, whatever a model's own eps is


def _gated_delta(
    x: Array, ba: Array, A_log: Array, dt_bias: Array, state: Array, cu_seqlens: Array, seq_lens: Array,
    state_slots: Array, *, start: int = 0,
) -> tuple[Array, Array]:  # fmt: skip
    _, H, K, V = state.shape
    x, ba = upcast(x), upcast(ba[:, start : start + 2 * H])
    G = (x.shape[1] - H * V) // (2 * K)
    q, k = (_unit(part.reshape(len(x), G, K)).repeat(H // G, 1) for part in np.split(x[:, : 2 * G * K], 2, 1))
    q /= math.sqrt(K)
    v = x[:, 2 * G * K :].reshape(-1, H, V)
    with np.errstate(over="ignore"):  # exp(-b) = inf gives the right limit, 0
        beta = 1 / (1 + np.exp(-ba[:, :H]))
    decay = np.exp(-np.exp(A_log) * np.logaddexp(0, ba[:, H:] + dt_bias))
    y = np.zeros((len(x), H, V), x.dtype)
    for first, last, length, slot in zip(cu_seqlens, cu_seqlens[1:], seq_lens, state_slots, strict=False):
        if not length or first == last:
            continue  # a row of a decode step that belongs to no sequence, or a sequence that pads a pass
        s = state[slot].astype(x.dtype) if length > last - first else np.zeros((H, K, V), x.dtype)
        for t in range(first, last):
            s *= decay[t, :, None, None]
            delta = beta[t, :, None] * (v[t] - (k[t, :, None] @ s)[:, 0])
            s += k[t, :, :, None] * delta[:, None]
            y[t] = (q[t, :, None] @ s)[:, 0]
        state[slot] = s
    return y.reshape(len(x), -1), state


def _unit(x: Array) -> Array:
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True) + _EPS)


# ---- kernels ---------------------------------------------------------------------------------------------------------

_MAX_SIZE = 256  # K and V, as registers hold the state
_COLUMNS = 4  # of a lane, in one access of 16 bytes
_WARPS = 4  # of a block, at most

# gated_delta_chunks.cu
_TOKENS, _CHUNK_COLUMNS, _CHUNK_THREADS = 32, 64, 192
_MAX_CHUNK_ROWS = 128  # K, as registers hold the state
_LEAST_TOKENS = 8  # of a sequence, on average: fewer are done sooner one after the other


def _kernels(call: Call, device: Device) -> Plan:
    for name in "KV":
        if call[name] % 8 or call[name] > _MAX_SIZE:
            raise OpError(f"gated_delta: {name} is {call[name]}; the kernel takes multiples of 8 up to {_MAX_SIZE}")
    return Plan(((_chunks if _in_chunks(call, device) else _steps)(call, device),))


def _in_chunks(call: Call, device: Device) -> bool:
    """The two kernels add in different orders: a decode step that may not differ from a prompt has one for both."""
    fits = call["K"] % 16 == 0 and call["K"] <= _MAX_CHUNK_ROWS and call["V"] % _CHUNK_COLUMNS == 0
    many = call["n"] >= _LEAST_TOKENS * call["b"] and not device.deterministic
    return fits and many and device.arch >= 80 and call.dtypes["T"].itemsize == 2


def _chunks(call: Call, device: Device) -> Launch:
    b, H, K, V = (call[name] for name in "bHKV")
    rows, squares = _TOKENS * (2 * K + _CHUNK_COLUMNS), 4 * _TOKENS**2  # elements of a chunk
    grid, shared = (V // _CHUNK_COLUMNS, H, b), 2 * (3 * rows + 2 * squares)
    return Launch("gated_delta_chunks.cu:gated_delta_chunks", grid, (_CHUNK_THREADS,), shared, {"G": call["G"]})


def _steps(call: Call, device: Device) -> Launch:
    """Token after token. A warp has all rows of some columns of a head's state: more lanes share long columns."""
    b, H, K, V = (call[name] for name in "bHKV")
    groups = 16 if K > 128 and K % 16 == 0 else 8
    tiles = -(-V // (32 // groups * _COLUMNS))
    # One sequence has few warps: they are blocks of their own, so that no multiprocessor is left out.
    warps = min(_WARPS, tiles) if b * H * tiles >= 8 * _WARPS * device.sms else 1
    constants = {"GROUPS": groups, "G": call["G"]}
    return Launch("gated_delta.cu:gated_delta", (-(-tiles // warps), H, b), (32 * warps,), constants=constants)


# ---- cases -----------------------------------------------------------------------------------------------------------


def _case(
    new: list[int], seq_lens: list[int], G: int, H: int, K: int, V: int, before: int = 0, behind: int = 0
) -> dict[str, Any]:
    """before, behind: columns of ba beside those of b and a."""
    return stateful_case(new, seq_lens, G=G, H=H, K=K, V=V, m=before + 2 * H + behind, start=before)


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Gates as models have them: heads that forget within a token, and heads that hardly do."""
    given, H = sequence_inputs(rng, case), case["H"]
    x = rng.standard_normal((case["n"], 2 * case["G"] * case["K"] + H * case["V"]))
    return {
        **given,
        "x": narrow(x.astype(np.float32), T),
        "A_log": rng.uniform(math.log(0.01), math.log(16), H).astype(np.float32),
        "dt_bias": rng.uniform(-7, 4, H).astype(np.float32),
        "state": random_state(rng, given, (case["Z"], H, case["K"], case["V"]), np.dtype(np.float32)),
    }


def _sizes(draw: Draw) -> dict[str, Any]:
    G, sizes = draw(1, 3), (8, 16, 24, 40, 64, 128, 136, 256)
    found = _case(*random_sequences(draw), G, G * draw(1, 3), sizes[draw(0, 7)], sizes[draw(0, 7)])
    start, behind = draw(0, 20), draw(0, 20)
    return {**found, "m": start + found["m"] + behind, "start": start}


def _bytes(c: Call) -> float:
    rows = c["n"] * (2 * c["G"] * c["K"] + 2 * c["H"] * c["V"] + 2 * c["H"])
    return float(rows * c.dtypes["T"].itemsize + 8 * c["b"] * c["H"] * c["K"] * c["V"])


gated_delta = Op(
    "gated_delta",
    "y[n,H*V]:T, state[Z,H,K,V]:f32 = (x[n,2*G*K+H*V]:T, ba[n,m]:T, A_log[H]:f32, dt_bias[H]:f32,"
    " state[Z,H,K,V]:f32, cu_seqlens[b+1]:i32, seq_lens[b]:i32, state_slots[b]:i32, start:i32=0)",
    doc="y = q^T S / sqrt(K) with S = exp(g) S + k (beta (v - exp(g) k^T S)) for each token of each value head. x holds"
    " q and k of G key heads, taken as unit vectors, and v of H value heads; ba holds b and a of all heads, in the"
    " columns from start on, with beta = sigmoid(b) and g = -exp(A_log) log(1 + exp(a + dt_bias))."
    " state[state_slots[i]] is S of sequence i and is updated; a sequence whose seq_lens is the number of its new"
    " tokens begins with zeros.",
    reference=_gated_delta,
    kernels=_kernels,
    kernel_docs={
        "gated_delta": "Token after token, the state in registers: for decode steps and float32.",
        "gated_delta_chunks": "Chunks of 32 tokens, on tensor cores: for prompts.",
    },
    cases=[
        _case([1], [7], 1, 2, 128, 128),
        _case([1, 1, 1], [1, 0, 30], 2, 2, 64, 64, before=5),
        _case([1, 1], [2, 9], 2, 6, 24, 8),
        _case([9, 0, 4], [12, 0, 4], 1, 3, 24, 40),
        _case([70], [70], 1, 1, 64, 64, before=8, behind=3),
        _case([2, 150, 64], [130, 150, 65], 1, 2, 128, 128),
        _case([33, 0, 40], [60, 0, 40], 2, 2, 48, 192),
    ],
    compiled=lambda case: case["K"] in (64, 128),
    sizes=_sizes,
    inputs=_inputs,
    rules=("H % G == 0", "start + 2 * H <= m"),
    shape=dict(b=1, length=512, new=1, G=16, H=48, K=128, V=128, m=16480, start=16384),
    complete=equal_sequences,
    unaligned=False,
    # float32 sums over K, which every token hands on to the next; of prompts in 16 bits, factors that are two numbers
    # of that size.
    tolerance={"f32": 32.0, "f16:f32": 256.0, "bf16:f32": 256.0},
    bytes=_bytes,
    flops=lambda c: 6 * c["n"] * c["H"] * c["K"] * c["V"],
)
