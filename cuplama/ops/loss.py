"""The loss of a language model, and what it says of the logits. Kernels: cuda_src/loss.cu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op

__all__ = ["add_sum", "cross_entropy", "softmax_mixture"]

_WIDTH = 8  # logits that a thread takes at once, as in the kernels
_NARROW, _WIDE = 512, 1024  # threads of a block: two or one a multiprocessor
_NARROW_ROWS = 57344  # elements of a row up to which two rows a multiprocessor find in L2 what is not held
_RESERVED = 1024  # bytes of shared memory that a block costs, its own sums among them


def _softmax(logits: Array) -> tuple[Array, Array]:
    """Probabilities [n,V], and the logarithm of the sum of exponentials [n]."""
    largest = logits.max(-1, keepdims=True)
    p = np.exp(logits - largest)
    total = p.sum(-1, keepdims=True)
    return p / total, (largest + np.log(total))[:, 0]


def _cross_entropy(
    logits: Array, targets: Array, weights: Array, mixture: Array | None, *, alpha: float, T: str
) -> tuple[Array, Array]:
    logits = upcast(logits)
    rows = np.arange(len(logits))
    with np.errstate(invalid="ignore"):
        dlogits, lse = _softmax(logits)
        loss = lse - (1 - alpha) * logits[rows, targets]
        dlogits[rows, targets] -= 1 - alpha
        if mixture is not None:
            loss -= alpha * (mixture * logits).sum(-1)
            dlogits -= alpha * mixture
        skipped = weights == 0
        return np.where(skipped, 0, weights * loss), np.where(skipped[:, None], 0, weights[:, None] * dlogits)


def _softmax_mixture(logits: Array, a: Array | None, *, share: float) -> Array:
    p = share * _softmax(logits)[0]
    return p if a is None else a + p


def _add_sum(total: Array, x: Array) -> Array:
    total += x.sum()
    return total


def _row_kernels(call: Call, device: Device) -> Plan:
    """A block a row; shared memory holds of a row what it can, in whole iterations of the block."""
    V = call["V"]
    threads = _NARROW if V <= _NARROW_ROWS else _WIDE
    threads = min(threads, max(64, -(-V // (2 * _WIDTH) // 32) * 32))
    iteration = threads * _WIDTH
    room = (device.shared - 2 * _RESERVED) * min(threads, _WIDE) // _WIDE
    held = min(-(-(V + _WIDTH) // iteration), room // (4 * iteration))
    kernel = f"loss.cu:{call.op.name}"
    return Plan((Launch(kernel, (call["n"],), (threads,), 4 * held * iteration, {"held": held}),))


def _sum_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("loss.cu:add_sum", (1,), (min(1024, -(-call["n"] // 32) * 32),)),))


def _loss_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Logits as of a model that has learned something; some rows of weight 0, and in those NaN and infinities."""
    n, V = case["n"], case["V"]
    logits = (3 * rng.standard_normal((n, V))).astype(np.float32)
    weights = rng.choice(np.array([1.0, 0.25, 2.0], np.float32), n)
    weights[1::3] = 0
    logits[1::6, V // 2], logits[4::6, V - 1] = np.nan, np.inf
    if case.get("broken"):
        logits[0, V // 3] = np.nan
    mixture = rng.dirichlet(np.full(V, 0.3), n).astype(np.float32)
    return {
        "logits": logits,
        "targets": rng.integers(0, V, n).astype(np.int32),
        "weights": weights,
        "mixture": mixture if case.get("mixture", True) else None,
        "a": 0.5 * mixture if case.get("a", True) else None,
    }


def _mixture_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    given = _loss_inputs(rng, case, T)
    return {"logits": np.nan_to_num(given["logits"], posinf=3.0), "a": given["a"]}


def _sum_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Losses, which are not negative: what a sum of few numbers of either sign is off by is not bounded by it."""
    return {"total": rng.random(1, np.float32), "x": rng.gamma(2.0, 2.0, case["n"]).astype(np.float32)}


def _sizes(draw: Draw) -> dict[str, Any]:
    learned = bool(draw(0, 1))
    return dict(n=draw(1, 6), V=draw(1, 3000), mixture=learned, alpha=0.75 * learned, a=bool(draw(0, 1)), share=0.5)


cross_entropy = Op(
    "cross_entropy",
    "loss[n]:f32, dlogits[n,V]:T = (logits[n,V]:f32, targets[n]:i32, weights[n]:f32, mixture[n,V]:f32?, alpha:f32)",
    doc="loss = weights (lse - (1 - alpha) logits[targets] - alpha sum(mixture logits)), where lse is the logarithm of"
    " the sum of exp(logits), and its gradient: dlogits = weights (softmax(logits) - (1 - alpha) onehot(targets) -"
    " alpha mixture). The rows of mixture are probabilities; alpha is 0 without them. A row of weight 0 gives zeros,"
    " whatever its logits are.",
    reference=_cross_entropy,
    kernels=_row_kernels,
    cases=[
        dict(n=1, V=8, mixture=False, alpha=0.0, T="T"),
        dict(n=5, V=7, mixture=True, alpha=0.5, T="T"),  # rows shorter than a thread's share
        dict(n=9, V=1003, mixture=False, alpha=0.0, T="T"),  # rows begin at all places
        dict(n=9, V=1003, mixture=True, alpha=1.0, T="T"),
        dict(n=2, V=4096, mixture=True, alpha=0.25, T="T", broken=True),
        dict(n=3, V=50257, mixture=False, alpha=0.0, T="T"),  # more than shared memory holds
        dict(n=1, V=60001, mixture=True, alpha=0.5, T="T"),  # a wide block
    ],
    sizes=lambda draw: {**_sizes(draw), "T": "T"},
    inputs=_loss_inputs,
    shape=dict(n=4096, V=50257, mixture=False, alpha=0.0, T="T"),
    # Units of float32's rounding: a row's sum of V exponentials is a factor that all of its elements have in common,
    # and a thread adds a hundred of them before a tree adds its share to the others'.
    tolerance={"f32": 12.0},
    flops=lambda c: 6 * c["n"] * c["V"],
)

softmax_mixture = Op(
    "softmax_mixture",
    "p[n,V]:f32 = (logits[n,V]:f32, a[n,V]:f32?, share:f32)",
    doc="p = a + share softmax(logits): a teacher's probabilities, added to those of others",
    reference=_softmax_mixture,
    kernels=_row_kernels,
    cases=[
        dict(n=1, V=8, a=False, share=1.0),
        dict(n=5, V=7, a=True, share=0.5),
        dict(n=9, V=1003, a=True, share=0.25),
        dict(n=2, V=50257, a=False, share=0.5),
        dict(n=1, V=60001, a=True, share=0.5),
    ],
    sizes=_sizes,
    inputs=_mixture_inputs,
    shape=dict(n=4096, V=50257, a=True, share=0.5),
    tolerance={"f32": 12.0},  # as of cross_entropy
    flops=lambda c: 6 * c["n"] * c["V"],
)

add_sum = Op(
    "add_sum",
    "total[1]:f32 = (total[1]:f32, x[n]:f32)",
    doc="total += sum(x)",
    reference=_add_sum,
    kernels=_sum_kernels,
    cases=[dict(n=n) for n in (1, 33, 1024, 5000)],
    sizes=lambda draw: dict(n=draw(1, 9000)),
    inputs=_sum_inputs,
    shape=dict(n=16384),
    flops=lambda c: c["n"],
)
