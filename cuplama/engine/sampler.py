"""The sampler of a set of sequences: its inputs, and the nodes that turn logits into the next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..models.graph import LOGITS
from ..ops.node import Node
from ..sampling_params import SamplingParams
from .constraint import MaskWords, mask_words
from .sequence import SequenceState, Token

__all__ = ["MASK", "TOKEN", "Needs", "Sampler", "drawn_tokens", "fill_masks", "sampling_nodes", "scoring_nodes"]

TOKEN = "token"  # [b] int32: the drawn ids
MASK = "token_mask"  # [b, words] int32: what may be drawn, a bit for each token
_SCORES = ("logprob", "top_ids", "top_logprobs")
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")
_PENALTIES = ("repetition", "presence", "frequency")
_PADDING = {"repetition": 1, MASK: -1}  # what padding rows, which belong to no sequence, hold where 0 would not do


@dataclass(frozen=True)
class Needs:
    """What a sampler must be able to do.

    penalised: change logits before the draw (by penalties, a bias, or by holding stop tokens back), and count drawn
    tokens; biased: by a bias among them; stops: stop tokens of a sequence at most, a power of two; masked: leave out
    tokens that a constraint forbids; top_n: how many of the most probable tokens to report beside the drawn one, None
    for no log-probabilities.
    """

    penalised: bool = False
    biased: bool = False
    stops: int = 1
    masked: bool = False
    top_n: int | None = None

    @classmethod
    def of(cls, sequences: Iterable[SequenceState], vocab_size: int) -> Needs:
        """What these sequences need together."""
        found = cls()
        for s in sequences:
            p = s.params
            if _is_penalised(p):
                stops = 1 << max(0, len(s.stop_ids) - 1).bit_length() if p.min_tokens else 1
                found = replace(
                    found, penalised=True, biased=found.biased or bool(p.logit_bias), stops=max(found.stops, stops)
                )
            if s.constraint is not None:
                found = replace(found, masked=True)
            if p.logprobs is not None:
                found = replace(found, top_n=min(max(found.top_n or 0, p.logprobs), vocab_size))
        return found

    def cover(self, other: Needs) -> bool:
        """Whether a sampler that can do this can do what another set of sequences needs."""
        return (
            self.penalised >= other.penalised
            and self.biased >= other.biased
            and (not other.penalised or self.stops >= other.stops)
            and self.masked >= other.masked
            and (-1 if self.top_n is None else self.top_n) >= (-1 if other.top_n is None else other.top_n)
        )


@cache
def sampling_nodes(needs: Needs) -> tuple[Node, ...]:
    """The nodes from ``LOGITS`` [b, V] to ``TOKEN`` [b]. "seq_lens" is the position of the token to draw."""
    nodes, logits = [], LOGITS
    if needs.penalised:
        before = (LOGITS, "seen", "bias" if needs.biased else "", "stop_ids", "seq_lens", "min_positions")
        nodes.append(Node("penalize", ("logits.penalised",), (*before, *_PENALTIES)))
        logits = "logits.penalised"
    if needs.masked:
        nodes.append(Node("token_mask", ("logits.masked",), (logits, MASK)))
        logits = "logits.masked"
    nodes.append(Node("sample", (TOKEN,), (logits, *_SETTINGS, "seq_lens")))
    if needs.penalised:
        nodes.append(Node("count_token", ("seen",), ("seen", TOKEN)))
    if needs.top_n is not None:
        nodes.append(Node("logprobs", _SCORES, (LOGITS, TOKEN), {"N": needs.top_n}))
    return tuple(nodes)


@cache
def scoring_nodes(top_n: int) -> tuple[Node]:
    """The node that scores given tokens, ``TOKEN`` [n], under ``LOGITS`` [n, V]."""
    return (Node("logprobs", _SCORES, (LOGITS, TOKEN), {"N": top_n}),)


class Sampler:
    """What the sampler's nodes need for one set of sequences. inputs: host arrays by name; row i is sequence i.

    needs: what it must be able to do, at least what the sequences need; by default that.
    """

    def __init__(self, vocab_size: int, active: Sequence[SequenceState], needs: Needs | None = None) -> None:
        self.needs = needs or Needs.of(active, vocab_size)
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
        if self.needs.penalised:
            self.inputs |= _penalties(vocab_size, active, self.needs)
            self.inputs |= {name: column(f"{name}_penalty", np.float32) for name in _PENALTIES}
        if self.needs.masked:
            self.inputs[MASK] = np.full((len(active), mask_words(vocab_size)), -1, np.int32)
            fill_masks(self.inputs[MASK], active)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes; the same tuple for samplers that need the same, since backends keep what they plan for a list."""
        return sampling_nodes(self.needs)

    @property
    def outs(self) -> tuple[str, ...]:
        """The values to read: the tokens, then the log-probabilities if they were asked for."""
        return (TOKEN,) if self.needs.top_n is None else (TOKEN, *_SCORES)

    def empty_inputs(self, sequences: int) -> dict[str, np.ndarray[Any, Any]]:
        """Zeros of the inputs' shapes for so many sequences."""
        return {name: np.zeros((sequences, *a.shape[1:]), a.dtype) for name, a in self.inputs.items()}

    def pad_into(self, host: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write the inputs into the arrays of ``host``, which may have more rows, and padding into the rest."""
        for name, array in self.inputs.items():
            host[name].fill(_PADDING.get(name, 0))
            host[name][: len(array)] = array


def fill_masks(masks: MaskWords, sequences: Sequence[SequenceState]) -> None:
    """Write what each sequence with a constraint may draw next into its row of masks [b, mask_words(V)]."""
    for row, s in zip(masks, sequences, strict=True):
        if s.constraint is not None and s.finish_reason is None:
            s.constraint.fill_mask(row)


def _penalties(vocab_size: int, active: Sequence[SequenceState], needs: Needs) -> dict[str, np.ndarray[Any, Any]]:
    """Counts, bias and stop tokens; see the op ``penalize``. One that is not penalised holds no stop token back."""
    seen = np.zeros((len(active), vocab_size), np.int32)
    bias = np.zeros((len(active) if needs.biased else 0, vocab_size), np.float32)
    stop_ids = np.full((len(active), needs.stops), -1, np.int32)
    for i, s in enumerate(active):
        np.add.at(seen[i], s.tokens[len(s.prompt) :], 2)
        seen[i, list(s.prompt)] |= 1
        if s.params.logit_bias:
            bias[i, list(s.params.logit_bias)] = list(s.params.logit_bias.values())
        if s.params.min_tokens:
            stop_ids[i, : len(s.stop_ids)] = sorted(s.stop_ids)
    found: dict[str, np.ndarray[Any, Any]] = {"seen": seen, "stop_ids": stop_ids}
    if needs.biased:
        found["bias"] = bias
    # A constraint holds stop tokens back by itself: it knows whether anything else may follow.
    least = [0 if s.constraint is not None else s.params.min_tokens for s in active]
    ends = [min(len(s.prompt) + n, 2**31 - 1) for s, n in zip(active, least, strict=True)]
    return {**found, "min_positions": np.array(ends, np.int32)}


def drawn_tokens(rows: Sequence[tuple[int, SequenceState]], outs: Sequence[np.ndarray[Any, Any]]) -> list[Token]:
    """A Token for each (row, sequence), from the host copies of ``Sampler.outs``, in that order."""
    ids = outs[0].tolist()
    if len(outs) == 1:
        return [_token(ids[row]) for row, _ in rows]
    return [_scored(row, ids[row], s.params.logprobs, outs[1:]) for row, s in rows]


@lru_cache(1 << 18)
def _token(id: int) -> Token:
    """A token without scores. They are equal and never change, so one of each will do: making them takes 0.5 us."""
    return Token(id)


def _scored(row: int, id: int, n: int | None, scores: Sequence[np.ndarray[Any, Any]]) -> Token:
    """The token with its log-probability and the ``n`` best; without, if it is not asked for them."""
    if n is None:
        return _token(id)
    logprobs, top_ids, top = (a[row] for a in scores)
    pairs = tuple((int(k), float(v)) for k, v in zip(top_ids[:n], top[:n], strict=True))
    return Token(id, float(logprobs), pairs)


def _is_penalised(p: SamplingParams) -> bool:
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or p.min_tokens > 0
    )
