"""Sampling parameters: what they mean, their defaults, and the checks on them. The arithmetic is in ops/sampling.py."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ParameterError

__all__ = ["SamplingParams", "sampling_defaults"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop. Raises ParameterError (a ValueError) naming what is out of range.

    The order is that of Hugging Face: penalties, logit_bias, min_tokens, temperature, top_k, top_p, min_p.

    max_tokens: tokens to generate at most; None: until the context is full.
    min_tokens: stop tokens cannot be drawn before this many tokens.
    temperature: 0 is greedy.
    top_k: keep the k largest; 0 is off. top_p: keep the most probable tokens that together reach p; 1 is off.
    min_p: keep tokens with at least min_p times the largest probability; 0 is off.
    repetition_penalty: divides (or multiplies, if negative) the logits of tokens in the prompt or the text; 1 is off
    (Keskar et al., arXiv:1909.05858). presence_penalty, frequency_penalty: subtracted once, or per occurrence, for
    tokens in the generated text.
    logit_bias: token id -> value added to its logit.
    seed: None draws one; the same seed gives the same text, alone or in a batch, on every backend.
    stop: strings that end the text (and are not part of it). stop_token_ids: further stop tokens.
    ignore_eos: do not stop at the model's own stop tokens.
    logprobs: None for none, 0 for the chosen token's, n for the n most probable besides.
    """

    max_tokens: int | None = 512
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, (ok, wanted) in _RULES.items():
            value = getattr(self, name)
            if not ok(value):
                raise ParameterError(f"{name} = {value!r} is out of range; it must be {wanted}")

    def with_seed(self) -> int:
        """The seed, or a fresh one from the operating system."""
        return int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed


def _int(low: int, high: int | None = None, none: bool = False) -> Any:
    def ok(value: Any) -> bool:
        if value is None:
            return none
        return type(value) is int and value >= low and (high is None or value <= high)

    return ok


def _real(low: float, high: float, *, open_low: bool = False) -> Any:
    def ok(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (value > low if open_low else value >= low) and value <= high

    return ok


def _strings(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(s, str) and s for s in value)


def _ids(value: Any) -> bool:
    return isinstance(value, Sequence) and all(type(i) is int and i >= 0 for i in value)


def _biases(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        type(k) is int and k >= 0 and isinstance(v, (int, float)) and not math.isnan(v) for k, v in value.items()
    )


_RULES: Mapping[str, tuple[Any, str]] = {
    "max_tokens": (_int(0, none=True), "a whole number >= 0, or None"),
    "min_tokens": (_int(0), "a whole number >= 0"),
    "temperature": (_real(0, math.inf), "a number >= 0"),
    "top_k": (_int(0), "a whole number >= 0 (0 is off)"),
    "top_p": (_real(0, 1), "a number from 0 to 1 (1 is off)"),
    "min_p": (_real(0, 1), "a number from 0 to 1 (0 is off)"),
    "repetition_penalty": (_real(0, math.inf, open_low=True), "a number > 0 (1 is off)"),
    "presence_penalty": (_real(-math.inf, math.inf), "a finite number"),
    "frequency_penalty": (_real(-math.inf, math.inf), "a finite number"),
    "logit_bias": (_biases, "a mapping of token ids to numbers"),
    "seed": (_int(0, 2**64 - 1, none=True), "a whole number from 0 to 2^64 - 1, or None"),
    "stop": (_strings, "a string or a list of non-empty strings"),
    "stop_token_ids": (_ids, "a list of token ids"),
    "ignore_eos": (lambda v: isinstance(v, bool), "True or False"),
    "logprobs": (_int(0, 64, none=True), "a whole number from 0 to 64, or None"),
}

# generation_config.json names of the parameters that it may set.
_GENERATION_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a model's generation_config.json sets.

    ``do_sample: false`` means greedy whatever else the file says; a file that says nothing of sampling means greedy
    too, as in transformers.
    """
    found = {ours: generation_config[k] for k, ours in _GENERATION_KEYS.items() if generation_config.get(k) is not None}
    sampling = generation_config.get("do_sample")
    if sampling is None:
        sampling = "temperature" in found or "top_p" in found
    if not sampling:
        return {k: v for k, v in found.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
    return {"temperature": 1.0, **found}


PARAMETERS = tuple(f.name for f in fields(SamplingParams))
