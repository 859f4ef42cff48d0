"""The loss of a language model and its gradient. Kernels: cuda_src/loss.cu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Draw, Op
from .team import fill_rows

__all__ = ["add_sum", "cross_entropy", "softmax_mixture"]

_COST = 24  # of a logit with its exponentials, in multiply-adds
_WIDTH = 8  # logits that a thread takes at once, as in the kernels
_NARROW, _WIDE = 512, 1024  # threads of a block: two or one a multiprocessor
_NARROW_ROWS = 57344  # elements of a row up to which two rows a multiprocessor find in L2 what is not held
_RESERVED = 1024  # bytes of shared memory that a block costs, its own sums among them


def _log_softmax(logits: Array) -> Array:
    with np.errstate(invalid="ignore"):  # infinities, in rows that have no part in the loss as a rule
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array,
    mixture: Array | None = None,
    *,
    V: int,
    alpha: float,
    first: int,
    U: str = "",
) -> tuple[Array, Array]:
    loss = np.empty(len(logits), logits.dtype)

    def piece(rows: slice) -> Array:
        """The gradient of some rows; their losses are written on the way."""
        count = np.arange(rows.start or 0, min(rows.stop, len(logits)))
        t, w, at = targets[first + count], weights[first + count], np.arange(len(count))
        log_p = _log_softmax(logits[rows, :V])
        lost = -(1 - alpha) * log_p[at, t]
        if mixture is not None:
            lost = lost - alpha * (mixture[rows, :V] * log_p).sum(-1)
        loss[count] = np.where(w != 0, lost * w, 0)
        dlogits = np.zeros((len(count), logits.shape[1]), logits.dtype)
        inner = np.exp(log_p, out=dlogits[:, :V])
        inner[at, t] -= 1 - alpha
        if mixture is not None:
            inner -= alpha * mixture[rows, :V]
        inner *= w[:, None]
        inner[w == 0] = 0  # not NaN, whatever its logits are
        return dlogits

    dlogits = fill_rows(np.empty_like(logits), piece, _COST)
    return loss, dlogits


def _softmax_mixture(logits: Array, a: Array | None = None, *, share: float) -> Array:
    p = np.exp(_log_softmax(logits)) * logits.dtype.type(share)
    return p if a is None else a + p


def _add_sum(total: Array, x: Array) -> Array:
    total += x.sum()
    return total


def _row_kernels(call: Call, device: Device) -> Plan:
    """A block a row; shared memory holds of a row what it can, in whole iterations of the block."""
    rows, width = call.shape(call.op.signature.ins[0])
    threads = _NARROW if width <= _NARROW_ROWS else _WIDE
    threads = min(threads, max(64, -(-width // (2 * _WIDTH) // 32) * 32))
    iteration = threads * _WIDTH
    room = (device.shared - 2 * _RESERVED) * min(threads, _WIDE) // _WIDE
    held = min(-(-(width + _WIDTH) // iteration), room // (4 * iteration))
    kernel = f"loss.cu:{call.op.name}"
    return Plan((Launch(kernel, (rows,), (threads,), 4 * held * iteration, {"held": held}),))


def _sum_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("loss.cu:add_sum", (1,), (min(1024, -(-call["n"] // 32) * 32),)),))


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Logits as of a model that has learned something; some weights of 0, and in their rows NaN and infinities."""
    n, r, V, M, first = case["n"], case["r"], case["V"], case["M"], case["first"]
    logits = 3 * rng.standard_normal((r, M), np.float32)
    weights = rng.choice(np.array([1.0, 0.25, 2.0], np.float32), n)
    weights[first + 1 : first + r : 3] = 0
    logits[1::6, V // 2], logits[4::6, V - 1] = np.nan, np.inf
    if case.get("broken"):
        logits[0, V // 3] = np.nan
    logits[:, V:] = np.nan  # not to be read
    given = {"logits": logits, "weights": weights}
    if case["mixture"]:
        given["mixture"] = np.full((r, M), np.nan, np.float32)
        given["mixture"][:, :V] = rng.dirichlet(np.full(V, 0.3), r)
    return given


def _sum_inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Losses, which are not negative: a sum of numbers of either sign may be much less than what it is off by."""
    return {"total": rng.random(1, np.float32), "x": rng.gamma(2.0, 2.0, case["n"]).astype(np.float32)}


def _case(n: int, r: int, first: int, V: int, mixture: bool = False, **other: Any) -> dict[str, Any]:
    alpha = 0.75 if mixture else 0.0
    return dict(n=n, r=r, first=first, V=V, M=V, mixture=mixture, alpha=alpha, U="T") | other


def _sizes(draw: Draw) -> dict[str, Any]:
    V = draw(2, 3000)
    return _case(9, draw(1, 5), draw(0, 4), V, bool(draw(0, 1)), M=V + draw(0, 1) * draw(1, 64))


def _gradient(g: Gradient) -> None:
    """The loss is the end of the chain: its own gradient is 1."""
    g.give("logits", g["dlogits"], in_T=g.attr("U") == "T")


# Units of float32's rounding: a row's sum of V exponentials is a factor that all of its elements have in common. A
# thread adds up to a hundred of them, before a tree adds up the threads.
_ROW_TOLERANCE = {"f32": 12.0}

cross_entropy = Op(
    "cross_entropy",
    "loss[r]:f32, dlogits[r,M]:U = (logits[r,M]:f32, targets[n]:i32, weights[n]:f32, mixture[r,M]:f32?, V:i32,"
    " alpha:f32, first:i32)",
    doc="The loss of rows first to first + r - 1 of a batch, and the gradient of their sum, with t and w the target"
    " and weight of a row and lse = log(sum(exp(logits))):"
    " loss = w (lse - (1 - alpha) logits[t] - alpha sum(mixture logits)),"
    " dlogits = w (softmax(logits) - (1 - alpha) onehot(t) - alpha mixture)."
    " mixture: probabilities to learn from (Hinton et al., arXiv:1503.02531). A row of weight 0 has no part in it."
    " V: the logits of a row; what lies behind them is not read, and its gradient is 0.",
    reference=_cross_entropy,
    kernels=_row_kernels,
    cases=[
        _case(1, 1, 0, 8),
        _case(5, 5, 0, 7, True),  # rows shorter than what a thread takes
        _case(11, 9, 2, 1023),  # rows that begin at all places, and need an iteration more for that
        _case(9, 9, 0, 1003, True, alpha=1.0),
        _case(2, 2, 0, 4096, True, broken=True),
        _case(4, 3, 1, 50257),  # more than shared memory holds
        _case(4, 3, 1, 1003, M=1024),
        _case(5, 5, 0, 70, True, M=77),
        _case(1, 1, 0, 60001, True),  # a wide block
    ],
    sizes=_sizes,
    rules=("first + r <= n", "V <= M"),
    inputs=_inputs,
    ranges={"targets": "V"},
    shape=_case(4096, 1024, 0, 50257, M=50304),
    tolerance=_ROW_TOLERANCE,
    flops=lambda c: 6 * c["r"] * c["V"],
    gradient=_gradient,
)

softmax_mixture = Op(
    "softmax_mixture",
    "p[n,V]:f32 = (logits[n,V]:f32, a[n,V]:f32?, share:f32)",
    doc="p = a + share softmax(logits): the mean of what several models predict, one after the other",
    reference=_softmax_mixture,
    kernels=_row_kernels,
    cases=[
        dict(n=n, V=V, a=a, share=0.25)
        for n, V, a in ((1, 8, False), (5, 7, True), (9, 1003, True), (2, 50257, False), (1, 60001, True))
    ],
    sizes=lambda draw: dict(n=draw(1, 5), V=draw(1, 3000), a=bool(draw(0, 1)), share=0.5),
    shape=dict(n=1024, V=50257, a=True, share=0.5),
    tolerance=_ROW_TOLERANCE,
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
