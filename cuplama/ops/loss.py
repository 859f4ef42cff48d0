"""The loss of a language model and its gradient. Kernels: cuda_src/loss.cu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array
from .gradient import Gradient
from .op import Op

__all__ = ["add_sum", "cross_entropy", "softmax_mixture"]


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array,
    mixture: Array | None = None,
    *,
    alpha: float,
    first: int,
    U: str = "",
) -> tuple[Array, Array]:
    rows = np.arange(len(logits))
    targets, weights = targets[first + rows], weights[first + rows]
    log_p = _log_softmax(logits)
    loss = -(1 - alpha) * log_p[rows, targets]
    dlogits = np.exp(log_p)
    dlogits[rows, targets] -= 1 - alpha
    if mixture is not None:
        loss = loss - alpha * (mixture * log_p).sum(-1)
        dlogits -= alpha * mixture
    learned = weights != 0
    return np.where(learned, loss * weights, 0), np.where(learned[:, None], dlogits * weights[:, None], 0)


def _softmax_mixture(logits: Array, a: Array | None = None, *, share: float) -> Array:
    p = np.exp(_log_softmax(logits)) * logits.dtype.type(share)
    return p if a is None else a + p


def _add_sum(total: Array, x: Array) -> Array:
    total += x.sum()
    return total


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """Weights of which some are 0, and a mixture that is a distribution."""
    n = case["n"]
    mixture = np.exp(rng.standard_normal((case["r"], case["V"])))
    return {
        "weights": (rng.random(n) * (rng.random(n) < 0.8)).astype(np.float32),
        "mixture": (mixture / mixture.sum(-1, keepdims=True)).astype(np.float32),
    }


def _gradient(g: Gradient) -> None:
    """The loss is the end of the chain: its own gradient is 1."""
    g.give("logits", g["dlogits"], in_T=True)


cross_entropy = Op(
    "cross_entropy",
    "loss[r]:f32, dlogits[r,V]:U = (logits[r,V]:f32, targets[n]:i32, weights[n]:f32, mixture[r,V]:f32?, alpha:f32,"
    " first:i32)",
    doc="The loss of rows first .. first + r - 1 of a batch, and the gradient of their sum, with t and w the target"
    " and weight of a row and lse = log(sum(exp(logits))):"
    " loss = w (lse - (1 - alpha) logits[t] - alpha sum(mixture logits)),"
    " dlogits = w (softmax(logits) - (1 - alpha) onehot(t) - alpha mixture)."
    " mixture: probabilities to learn from (Hinton et al., arXiv:1503.02531). A row of weight 0 has no part in it.",
    reference=_cross_entropy,
    cases=[
        dict(n=n, r=r, first=first, V=V, mixture=mixture, alpha=0.75 if mixture else 0.0, U="T")
        for n, r, first, V, mixture in (
            (1, 1, 0, 8, False),
            (4, 3, 1, 33, True),
            (9, 5, 2, 1000, False),
            (2, 2, 0, 5001, True),
            (9, 9, 0, 260, True),
        )
    ],
    sizes=lambda draw: dict(n=9, r=draw(1, 5), first=draw(0, 4), V=draw(2, 3000), alpha=0.0, mixture=False, U="T"),
    rules=("first + r <= n",),
    inputs=_inputs,
    ranges={"targets": "V"},
    gradient=_gradient,
)

softmax_mixture = Op(
    "softmax_mixture",
    "p[n,V]:f32 = (logits[n,V]:f32, a[n,V]:f32?, share:f32)",
    doc="p = a + share softmax(logits): the mean of what several models predict, one after the other",
    reference=_softmax_mixture,
    cases=[dict(n=n, V=V, a=a, share=0.25) for n, V, a in ((1, 8, False), (3, 33, True), (2, 5001, True))],
    sizes=lambda draw: dict(n=draw(1, 5), V=draw(1, 3000), a=bool(draw(0, 1)), share=0.5),
)

add_sum = Op(
    "add_sum",
    "total[1]:f32 = (total[1]:f32, x[n]:f32)",
    doc="total += sum(x)",
    reference=_add_sum,
    cases=[dict(n=n) for n in (1, 33, 1024, 5000)],
    sizes=lambda draw: dict(n=draw(1, 9000)),
)
