"""The softmax of attention's references, with what some models add to it: soft limits of scores, and sinks."""

from __future__ import annotations

import numpy as np

from ..dtypes import Array

__all__ = ["capped", "softmax"]


def capped(scores: Array, softcap: float) -> Array:
    """Scores with a soft limit, softcap * tanh(scores / softcap); as they are if softcap is 0.

    Gemma Team, "Gemma 2", arXiv:2408.00118.
    """
    return np.tanh(scores / softcap) * scores.dtype.type(softcap) if softcap else scores


def softmax(scores: Array, sink: Array | None = None) -> tuple[Array, Array]:
    """Turn scores [..., keys] into exponentials in place, relative to the largest logit of their row.

    sink: one more logit of each row, which has no value, as OpenAI's gpt-oss has it; [..., 1], or None. Returns the
    largest logit and the sum of the exponentials, both [..., 1] and with the sink.
    """
    most = scores.max(-1, keepdims=True)
    if sink is not None:
        most = np.maximum(most, sink)
    scores -= most
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    return most, total if sink is None else total + np.exp(sink - most)
