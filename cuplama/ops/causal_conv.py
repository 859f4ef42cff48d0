"""The short causal convolution before a gated delta rule. Kernel: cuda_src/causal_conv.cu.

Depthwise: each column is convolved with K weights of its own. What a sequence keeps between steps is its last K - 1
inputs, in a slot of ``conv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, narrow, upcast
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .signature import OpError

__all__ = [
    "causal_conv",
    "equal_sequences",
    "random_sequences",
    "random_state",
    "sequence_inputs",
    "stateful_case",
]

_THREADS = 128
_RUN = 8  # tokens of a tile; as in causal_conv.cu
_MAX_TAPS = _RUN + 1


def _causal_conv(
    x: Array, w: Array, bias: Array | None, conv: Array, cu_seqlens: Array, seq_lens: Array, state_slots: Array
) -> tuple[Array, Array]:
    d, taps = w.shape
    weights = upcast(w).T
    y = np.zeros((len(x), d), weights.dtype)
    for first, last, length, slot in zip(cu_seqlens, cu_seqlens[1:], seq_lens, state_slots, strict=False):
        new = int(last - first)
        if not length or not new:
            continue  # a row of a decode step that belongs to no sequence, or a sequence that pads a pass
        kept = conv[slot] if length > new else np.zeros_like(conv[slot])
        inputs = np.concatenate([kept, x[first:last, :d]])
        conv[slot] = inputs[new:]
        total = sum(weights[k] * inputs[k : k + new] for k in range(taps)) + (0 if bias is None else upcast(bias))
        with np.errstate(over="ignore"):  # exp(-total) = inf gives the right limit, 0
            y[first:last] = total / (1 + np.exp(-total))
    return y, conv


def stateful_case(new: list[int], seq_lens: list[int], **sizes: Any) -> dict[str, Any]:
    """A case with sequences of ``seq_lens`` tokens, the last ``new`` of each new, and two slots of state that no
    sequence has. A sequence without tokens has one row where n is b: a row that pads a decode step."""
    return dict(n=sum(new), b=len(new), new=new, seq_lens=seq_lens, Z=len(new) + 2, **sizes)


def equal_sequences(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The case of ``b`` sequences of ``length`` tokens, of which ``new`` are new: as people ask for it."""
    rest = {name: size for name, size in sizes.items() if name not in ("b", "length", "new")}
    return stateful_case([sizes["new"]] * sizes["b"], [sizes["length"]] * sizes["b"], **rest)


def random_sequences(draw: Draw) -> tuple[list[int], list[int]]:
    """``new`` and ``seq_lens`` of a random case: a decode step, or up to three sequences with some new tokens each."""
    new = [1] * draw(1, 4) if draw(0, 1) else [draw(1, 40) for _ in range(draw(1, 3))]
    return new, [n + draw(0, 1) * draw(0, 9) for n in new]


def sequence_inputs(rng: np.random.Generator, case: Mapping[str, Any]) -> dict[str, Array]:
    """The integer inputs of a case of ``stateful_case``: where sequences begin, their lengths, and slots at random."""
    return {
        "cu_seqlens": np.concatenate([[0], np.cumsum(case["new"])]).astype(np.int32),
        "seq_lens": np.array(case["seq_lens"], np.int32),
        "state_slots": rng.permutation(case["Z"])[: case["b"]].astype(np.int32),
    }


def random_state(
    rng: np.random.Generator, given: Mapping[str, Array], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """A state [Z, ...] for ``given``, of ``sequence_inputs``: NaN where no sequence has something from before."""
    state = narrow(rng.standard_normal(shape).astype(np.float32), dtype)
    unused = np.ones(len(state), bool)
    unused[given["state_slots"][given["seq_lens"] > np.diff(given["cu_seqlens"])]] = False
    state[unused] = np.nan
    return state


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    given = sequence_inputs(rng, case)
    return {**given, "conv": random_state(rng, given, (case["Z"], case["K"] - 1, case["d"]), T)}


def _kernels(call: Call, device: Device) -> Plan:
    if not 2 <= call["K"] <= _MAX_TAPS:
        raise OpError(f"causal_conv: K is {call['K']}; the kernel takes 2 to {_MAX_TAPS}")
    tiles = call["n"] // _RUN + call["b"]
    grid = (tiles, -(-call["d"] // (8 * _THREADS)))
    return Plan((Launch("causal_conv.cu:causal_conv", grid, (_THREADS,)),))


def _bytes(c: Call) -> float:
    rows = 2 * c["n"] + c["K"] + 2 * c["b"] * (c["K"] - 1)
    return float(rows * c["d"] * c.dtypes["T"].itemsize)


def _case(new: list[int], seq_lens: list[int], d: int, m: int, K: int = 4, bias: bool = False) -> dict[str, Any]:
    return stateful_case(new, seq_lens, d=d, m=m, K=K, bias=bias)


def _sizes(draw: Draw) -> dict[str, Any]:
    d = draw(1, 300)
    return _case(*random_sequences(draw), d, d + draw(0, 1) * draw(1, 40), draw(2, _MAX_TAPS), bool(draw(0, 1)))


causal_conv = Op(
    "causal_conv",
    "y[n,d]:T, conv[Z,K-1,d]:T = (x[n,m]:T, w[d,K]:T, bias[d]:T?, conv[Z,K-1,d]:T, cu_seqlens[b+1]:i32,"
    " seq_lens[b]:i32, state_slots[b]:i32)",
    doc="y = silu(convolution of each of the first d columns of x with its K weights, over the tokens of a sequence,"
    " + bias). conv[state_slots[i]] holds the last K - 1 inputs of sequence i and is updated; a sequence whose seq_lens"
    " is the number of its new tokens begins, and zeros stand before it.",
    reference=_causal_conv,
    kernels=_kernels,
    cases=[
        _case([1], [9], 256, 256),
        _case([1, 1, 1], [1, 0, 30], 72, 80, bias=True),
        _case([5, 2, 1, 37], [5, 2, 20, 39], 40, 40, bias=True),
        _case([8, 0, 9], [17, 0, 9], 33, 45, K=2),
        _case([3, 20], [4, 20], 1032, 1040, K=9),
        _case([17], [17], 2560, 2560),
    ],
    compiled=lambda case: case["K"] == 4,
    sizes=_sizes,
    inputs=_inputs,
    rules=("d <= m",),
    shape=dict(b=1, length=512, new=1, d=10240, m=10240, K=4, bias=False),
    complete=equal_sequences,
    bytes=_bytes,
    flops=lambda c: c["n"] * c["d"] * (2 * c["K"] + 4),
)
