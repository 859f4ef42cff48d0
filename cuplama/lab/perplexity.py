"""Perplexity of a text under a model, by a sliding window.

Each window of ``window`` tokens starts ``stride`` after the one before, and only tokens that no earlier window has
scored are counted, so every token but the first is scored exactly once, with at least ``window - stride`` tokens
before it (fewer at the beginning of the text).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.pipeline import not_finite
from ..errors import ParameterError, PromptError
from ..model import Model

__all__ = ["Perplexity", "perplexity", "window_and_stride"]


@dataclass(frozen=True)
class Perplexity:
    """The score of a text.

    tokens: how many were scored; nats: the sum of their negative log-likelihoods; squares: the sum of the squares of
    these; size: bytes of the text in UTF-8.
    """

    tokens: int
    nats: float
    squares: float
    size: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood of the text to the base 2, for each of its bytes: comparable between tokenizers."""
        return self.nats / math.log(2) / self.size

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where a float64 cannot hold it."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the perplexity, from the spread of the tokens' log-likelihoods."""
        variance = max(0.0, self.squares / self.tokens - self.nats_per_token**2)
        return self.perplexity * math.sqrt(variance / max(1, self.tokens - 1))


def perplexity(
    model: Model,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score a text. window defaults to the model's context (at most 1024), stride to half of it.

    progress: called with (tokens scored, tokens in all). Raises ParameterError for a window or stride out of range,
    PromptError for a text of fewer than two tokens, and DeviceError for logits that are not finite.
    """
    window, stride = window_and_stride(model.context, window, stride)
    ids = model.encode(text) if text else []
    if len(ids) < 2:
        raise PromptError("the text has fewer than two tokens: there is nothing to score")
    tokens, nats, squares = 0, 0.0, 0.0
    scored = 1  # the first token has nothing before it
    for start in range(0, len(ids), stride):
        at = start
        for rows in model.engine.logits(ids[start : start + window][:-1]):
            first = max(scored - at - 1, 0)  # row r predicts token at + r + 1
            if first < len(rows):
                targets = ids[at + first + 1 : at + len(rows) + 1]
                losses = _losses(rows[first:], targets)
                if not np.isfinite(losses).all():
                    raise not_finite("the logits", model.backend.dtype.name)
                tokens, nats, squares = tokens + len(losses), nats + losses.sum(), squares + (losses**2).sum()
            at += len(rows)
        scored = at + 1
        if progress is not None:
            progress(tokens, len(ids) - 1)
        if scored >= len(ids):
            break
    return Perplexity(tokens, float(nats), float(squares), len(text.encode()))


def window_and_stride(context: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Both, checked against the context, with the defaults for None. Raises ParameterError naming what is wrong."""
    if context < 2:
        raise ParameterError(f"context = {context} is too short; a window needs at least 2 tokens")
    window = min(context, 1024) if window is None else window
    if not 2 <= window <= context:
        raise ParameterError(f"window = {window} is out of range; it must be from 2 to {context}, the context")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ParameterError(f"stride = {stride} is out of range; it must be from 1 to {window - 1}, below the window")
    return window, stride


def _losses(
    logits: np.ndarray[tuple[int, int], np.dtype[np.float32]], targets: Sequence[int]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Negative log-likelihood of each target, in nats."""
    exact = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which the caller looks for
        top = exact.max(-1)
        log_sum = top + np.log(np.exp(exact - top[:, None]).sum(-1))
        losses: np.ndarray[tuple[int], np.dtype[np.float64]] = (
            log_sum - exact[np.arange(len(targets)), np.asarray(targets)]
        )
    return losses
