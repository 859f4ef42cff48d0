"""TODO: engine.sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from ..ops import OPS
from ..sampling_params import SamplingParams
from .sequence import SequenceState, Token

__all__ = ["Sampler"]


class Sampler:
    """What the sampler's ops need for one set of sequences. inputs: host arrays by name; row i is sequence i.

    top_n: how many best tokens to report beside the drawn one; None: no log-probabilities.
    """

    def __init__(self, vocab: int, active: Sequence[SequenceState]) -> None:
        p = [s.params for s in active]

        def column(name: str, dtype: Any) -> np.ndarray[Any, Any]:
            return np.array([getattr(x, name) for x in p], dtype)

        self.inputs: dict[str, np.ndarray[Any, Any]] = {
            "temperature": column("temperature", np.float32),
            "top_k": np.array([min(x.top_k, 2**31 - 1) for x in p], np.int32),
            "top_p": column("top_p", np.float32),
            "min_p": column("min_p", np.float32),
            "seed": np.array([s.seed for s in active], np.uint64),
        }
        asked = [x.logprobs for x in p if x.logprobs is not None]
        self.top_n = min(max(asked), vocab) if asked else None
        if not any(_penalised(x) for x in p):
            return
        seen = np.zeros((len(active), vocab), np.int32)
        bias = np.zeros((len(active), vocab), np.float32)
        stop_ids = np.full((len(active), max([1, *(len(s.stop_ids) for s in active)])), -1, np.int32)
        for i, s in enumerate(active):
            np.add.at(seen[i], s.tokens[len(s.prompt) :], 2)
            seen[i, list(s.prompt)] |= 1
            bias[i, list(s.params.logit_bias)] = list(s.params.logit_bias.values())
            stop_ids[i, : len(s.stop_ids)] = sorted(s.stop_ids)
        self.inputs["seen"] = seen
        if any(x.logit_bias for x in p):
            self.inputs["bias"] = bias
        self.inputs["stop_ids"] = stop_ids
        ends = [min(len(s.prompt) + s.params.min_tokens, 2**31 - 1) for s in active]
        self.inputs["min_positions"] = np.array(ends, np.int32)
        for name in ("repetition", "presence", "frequency"):
            self.inputs[name] = column(f"{name}_penalty", np.float32)

    def draw(self, backend: Backend, inputs: Mapping[str, Array], logits: Array, pos: Array) -> tuple[Array, ...]:
        """Tokens [b] from logits [b, vocab] at positions pos [b]; then, if asked for, the outputs of ``logprobs``."""
        adjusted = logits
        if "seen" in inputs:
            before = [logits, inputs["seen"], inputs.get("bias"), inputs["stop_ids"], pos, inputs["min_positions"]]
            penalties = [inputs[name] for name in ("repetition", "presence", "frequency")]
            (adjusted,) = backend.call(OPS["penalize"], [*before, *penalties], {})
        settings = [inputs[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")]
        (tokens,) = backend.call(OPS["sample"], [adjusted, *settings, pos], {})
        if "seen" in inputs:
            backend.call(OPS["count_token"], [inputs["seen"], tokens], {})
        if self.top_n is None:
            return (tokens,)
        return (tokens, *backend.call(OPS["logprobs"], [logits, tokens], {"N": self.top_n}))


def drawn_tokens(active: Sequence[SequenceState], outs: Sequence[np.ndarray[Any, Any]]) -> list[Token]:
    """The drawn tokens, from the host copies of what ``Sampler.draw`` gave."""
    ids, *scores = outs
    if not scores:
        return [Token(int(i)) for i in ids[: len(active)]]
    found = []
    for s, i, logprob, top_ids, top in zip(active, ids, *scores, strict=False):
        n = s.params.logprobs
        pairs = tuple((int(k), float(v)) for k, v in zip(top_ids[:n], top[:n], strict=True))
        found.append(Token(int(i)) if n is None else Token(int(i), float(logprob), pairs))
    return found


def _penalised(p: SamplingParams) -> bool:
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or p.min_tokens > 0
    )
