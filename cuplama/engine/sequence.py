"""One sequence of tokens on its way through the engine, and the tokens that are drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..sampling_params import SamplingParams
from .constraint import Constraint

__all__ = ["SequenceState", "Token", "idle_sequence"]


@dataclass(frozen=True)
class Token:
    """A drawn token. logprob and top, [(id, logprob), ...], are of the raw logits; None and () unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class SequenceState:
    """A prompt and what is generated after it. The engine ends it by setting ``finish_reason`` to "stop" or "length".

    So may the caller, between two tokens. prompt: token ids; stop_ids: ids that end it; seed: of its draws; pages: its
    pages of the cache, in order; constraint: what it may draw, None for anything.
    """

    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    seed: int = 0
    tokens: list[int] = field(default_factory=list)  # prompt and generated
    cached: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.seed = self.params.with_seed()

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.prompt)


def idle_sequence(padding_page: int) -> SequenceState:
    """A sequence of one token on the padding page: it fills up a decode step, and nobody reads what it computes."""
    return SequenceState([0], SamplingParams(seed=0), frozenset(), pages=[padding_page])
