"""The sampler of a set of sequences: its inputs, and the nodes that turn logits into the next tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..models.graph import LOGITS
from ..ops.node import Node
from ..sampling_params import SamplingParams
from .constraint import MaskWords, mask_words
from .sequence import SequenceState, Token

__all__ = ["MASK", "TOKEN", "Sampler", "drawn_tokens", "fill_masks", "sampling_nodes"]

TOKEN = "token"  # [b] int32: the drawn ids
MASK = "token_mask"  # [b, mask_words(V)] int32: which tokens may be drawn; only where a sequence has a constraint
_SCORES = ("logprob", "top_ids", "top_logprobs")
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")
_PENALTIES = ("repetition", "presence", "frequency")
_PADDING = {"repetition": 1, MASK: -1}  # what padding rows, which belong to no sequence, hold where 0 would not do


@cache
def sampling_nodes(penalised: bool, biased: bool, top_n: int | None, masked: bool = False) -> tuple[Node, ...]:
    """The nodes from ``LOGITS`` [b, V] to ``TOKEN`` [b]. "seq_lens" is the position of the token to draw.

    penalised: whether logits are changed before the draw (by penalties, a bias, or by holding stop tokens back), and
    drawn tokens are counted; biased: whether there is a bias among them; top_n: how many of the most probable tokens to
    report beside the drawn one, None for no log-probabilities; masked: whether ``MASK`` says what may be drawn. The
    log-probabilities are those of the raw logits in any case.
    """
    nodes, logits = [], LOGITS
    if penalised:
        logits = "logits.penalised"
        before = (LOGITS, "seen", "bias" if biased else "", "stop_ids", "seq_lens", "min_positions")
        nodes.append(Node("penalize", (logits,), (*before, *_PENALTIES)))
    if masked:
        nodes.append(Node("token_mask", ("logits.masked",), (logits, MASK)))
        logits = "logits.masked"
    nodes.append(Node("sample", (TOKEN,), (logits, *_SETTINGS, "seq_lens")))
    if penalised:
        nodes.append(Node("count_token", ("seen",), ("seen", TOKEN)))
    if top_n is not None:
        nodes.append(Node("logprobs", _SCORES, (LOGITS, TOKEN), {"N": top_n}))
    return tuple(nodes)


class Sampler:
    """What the sampler's nodes need for one set of sequences. inputs: host arrays by name; row i is sequence i.

    Constraints are asked for their masks when it is made, and by ``fill_masks`` after each token.

    top_n: how many best tokens to report beside the drawn one; None: no log-probabilities.
    """

    def __init__(self, vocab_size: int, active: Sequence[SequenceState]) -> None:
        params = [s.params for s in active]

        def column(name: str, dtype: Any) -> np.ndarray[Any, Any]:
            return np.array([getattr(p, name) for p in params], dtype)

        self.inputs: dict[str, np.ndarray[Any, Any]] = {
            "temperature": column("temperature", np.float32),
            "top_k": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
            "top_p": column("top_p", np.float32),
            "min_p": column("min_p", np.float32),
            "seed": np.array([s.seed for s in active], np.uint64),
        }
        asked = [p.logprobs for p in params if p.logprobs is not None]
        self.top_n = min(max(asked), vocab_size) if asked else None
        if any(_is_penalised(p) for p in params):
            self.inputs |= _penalties(vocab_size, active)
            self.inputs |= {name: column(f"{name}_penalty", np.float32) for name in _PENALTIES}
        if any(s.constraint is not None for s in active):
            self.inputs[MASK] = np.full((len(active), mask_words(vocab_size)), -1, np.int32)
            fill_masks(self.inputs[MASK], active)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes; the same tuple for samplers that need the same, since backends keep what they plan for a list."""
        return sampling_nodes("seen" in self.inputs, "bias" in self.inputs, self.top_n, MASK in self.inputs)

    @property
    def outs(self) -> tuple[str, ...]:
        """The values to read: the tokens, then the log-probabilities if they were asked for."""
        return (TOKEN,) if self.top_n is None else (TOKEN, *_SCORES)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured step depends on: the nodes, and the shapes of the inputs but for the number of sequences."""
        return (self.top_n, *((name, array.shape[1:]) for name, array in self.inputs.items()))

    def empty_inputs(self, sequences: int) -> dict[str, np.ndarray[Any, Any]]:
        """Zeros of the inputs' shapes for so many sequences."""
        return {name: np.zeros((sequences, *a.shape[1:]), a.dtype) for name, a in self.inputs.items()}

    def pad_into(self, host: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write the inputs into the arrays of ``host``, which may have more rows, and padding into the rest."""
        for name, array in self.inputs.items():
            host[name].fill(_PADDING.get(name, 0))
            host[name][: len(array)] = array


def fill_masks(rows: MaskWords, active: Sequence[SequenceState]) -> None:
    """Ask each constraint what may be drawn next. rows [b, mask_words(V)]: row i is that of sequence i.

    Rows of sequences without a constraint, or that have ended, stay as they are. rows may have more than those.
    """
    for row, s in zip(rows, active, strict=False):
        if s.constraint is not None and s.finish_reason is None:
            s.constraint.fill_mask(row)


def _penalties(vocab_size: int, active: Sequence[SequenceState]) -> dict[str, np.ndarray[Any, Any]]:
    """Counts, bias and stop tokens; see the op ``penalize``."""
    seen = np.zeros((len(active), vocab_size), np.int32)
    bias = np.zeros((len(active), vocab_size), np.float32)
    stop_ids = np.full((len(active), max([1, *(len(s.stop_ids) for s in active)])), -1, np.int32)
    for i, s in enumerate(active):
        np.add.at(seen[i], s.tokens[len(s.prompt) :], 2)
        seen[i, list(s.prompt)] |= 1
        bias[i, list(s.params.logit_bias)] = list(s.params.logit_bias.values())
        stop_ids[i, : len(s.stop_ids)] = sorted(s.stop_ids)
    found: dict[str, np.ndarray[Any, Any]] = {"seen": seen, "stop_ids": stop_ids}
    if any(s.params.logit_bias for s in active):
        found["bias"] = bias
    # A constraint holds stop tokens back by itself: it knows whether anything else may follow.
    least = [0 if s.constraint is not None else s.params.min_tokens for s in active]
    ends = [min(len(s.prompt) + n, 2**31 - 1) for s, n in zip(active, least, strict=True)]
    return {**found, "min_positions": np.array(ends, np.int32)}


def drawn_tokens(active: Sequence[SequenceState], outs: Sequence[np.ndarray[Any, Any]]) -> list[Token]:
    """A Token for each sequence, from the host copies of ``Sampler.outs``, in that order."""
    ids, *scores = outs
    if not scores:
        return [Token(int(i)) for i in ids[: len(active)]]
    found = []
    for s, i, logprob, top_ids, top in zip(active, ids, *scores, strict=False):
        n = s.params.logprobs
        pairs = tuple((int(k), float(v)) for k, v in zip(top_ids[:n], top[:n], strict=True))
        found.append(Token(int(i)) if n is None else Token(int(i), float(logprob), pairs))
    return found


def _is_penalised(p: SamplingParams) -> bool:
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or p.min_tokens > 0
    )
