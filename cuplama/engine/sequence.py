"""One sequence of tokens on its way through the engine, and the tokens that are drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import CuplamaError
from ..sampling_params import SamplingParams
from .constraint import Constraint
from .state_cache import PADDING_SLOT

__all__ = ["SequenceState", "Token"]


@dataclass(frozen=True)
class Token:
    """A drawn token. logprob and top, [(id, logprob), ...], are of the raw logits; None and () unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class SequenceState:
    """A prompt and what is generated after it. The engine ends it by setting ``finish_reason``: "stop", "length", or
    "error" where ``error`` says why. So may the caller, between two tokens.

    What the caller gives: prompt: token ids; stop_ids: ids that end it; seed: of its draws; constraint: what it may
    draw; every_logit: the logits of the prompt are asked for, and nothing is drawn.

    What the engine keeps: tokens: of prompt and text; cached: of them, those whose keys and values are in the cache or
    will be when what is queued has run; pages: of the cache, in order; slot: of its state, PADDING_SLOT for none;
    error: why it failed.
    """

    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    seed: int = 0
    constraint: Constraint | None = None
    every_logit: bool = False
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    regime: tuple[int, ...] = ()  # of the rotation of those
    pages: list[int] = field(default_factory=list)
    slot: int = PADDING_SLOT
    borders: tuple[int, ...] = ()  # numbers of tokens behind which its state is to be kept, each the end of a page
    finish_reason: str | None = None
    error: CuplamaError | None = None
    prompt_scores: list[Token] = field(default_factory=list)  # of every token of the prompt but the first
    order: tuple[int, int] = (0, 0)  # (priority, arrival): the lower goes first
    limit: int = 0  # tokens that it has at the end
    ahead: int = 0  # tokens that are queued to be drawn for it, and not read yet
    life: int = 0  # how often it has lost its pages, or ended: what was queued before that is not for it any more
    row: int | None = None  # of the decode loop
    until: int = 0  # tokens that it has when it leaves that row
    found: int = 0  # tokens of the prompt that were in the prefix cache when it was admitted first
    admitted: float = 0.0  # when that was, by time.perf_counter()
    keys: list[bytes] = field(default_factory=list, repr=False)  # of its full pages, see ``prefix_cache.py``
    salt: str | None = None  # that they were made with
    told: int = 0  # tokens of the prompt whose logits or scores the caller has

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.seed = self.params.with_seed()

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def asks_for_prompt(self) -> bool:
        """Whether anything of the prompt's own logits is asked for, and not told yet."""
        scores = len(self.prompt) - 1 if self.params.prompt_logprobs is not None else 0
        return self.every_logit or self.told < scores
