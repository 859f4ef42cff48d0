"""Sampling parameters: what they mean, their defaults, and the checks on them. The arithmetic is in ops/sampling.py."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, TypedDict

from .errors import ParameterError

__all__ = ["PARAMETERS", "SamplingOptions", "SamplingParams", "sampling_defaults", "unsupported_settings"]


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keywords of ``generate`` and others, so that type checkers know them."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None


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
    seed: None draws one. The draw depends on seed, position and logits alone: the same seed gives the same text, and
    also in a batch and on other backends, as far as the logits are the same there; they are to rounding.
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
        for name, (read, wanted) in _RULES.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, read(value))
            except (TypeError, ValueError, OverflowError):
                raise ParameterError(f"{name} = {value!r:.80} is out of range; it must be {wanted}") from None

    def with_seed(self) -> int:
        """The seed, or a fresh one from the operating system."""
        return int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed


def _check(ok: bool) -> None:
    if not ok:
        raise ValueError


def _whole(value: Any) -> int:
    """An int from a whole number of any kind (NumPy's too), but not from a bool or 2.0."""
    _check(not isinstance(value, bool))
    return operator.index(value)


def _int(low: int, high: float = math.inf, none: bool = False) -> Callable[[Any], int | None]:
    def read(value: Any) -> int | None:
        if value is None and none:
            return None
        number = _whole(value)
        _check(low <= number <= high)
        return number

    return read


def _real(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        _check(isinstance(value, Real) and not isinstance(value, bool))
        number = float(value)
        _check(low <= number <= high)
        return number

    return read


def _temperature(value: Any) -> float:
    number = _real(0, _MAX_NUMBER)(value)
    return number if number >= 1e-6 else 0.0  # below, float32 logits cannot tell it from greedy


def _strings(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else () if value is None else tuple(value)
    _check(all(isinstance(s, str) and s for s in found))
    return found


def _ids(value: Any) -> tuple[int, ...]:
    found = () if value is None else tuple(_whole(i) for i in value)
    _check(all(i >= 0 for i in found))
    return found


def _biases(value: Any) -> dict[int, float]:
    _check(value is None or isinstance(value, Mapping))
    number = _real(-_MAX_NUMBER, _MAX_NUMBER)
    found = {_whole(k): -math.inf if v == -math.inf else number(v) for k, v in (value or {}).items()}
    _check(all(k >= 0 for k in found))
    return found


def _flag(value: Any) -> bool:
    _check(isinstance(value, bool))
    return bool(value)


_MAX_NUMBER = 1e30  # the sampler computes in float32, and sums and quotients of what is allowed must stay finite
# Parameter -> (reader, what it takes). A reader returns the value in plain Python types, or raises.
_RULES: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "max_tokens": (_int(0, none=True), "a whole number >= 0, or None"),
    "min_tokens": (_int(0), "a whole number >= 0"),
    "temperature": (_temperature, "a number >= 0"),
    "top_k": (_int(0), "a whole number >= 0 (0 is off)"),
    "top_p": (_real(0, 1), "a number from 0 to 1 (1 is off)"),
    "min_p": (_real(0, 1), "a number from 0 to 1 (0 is off)"),
    "repetition_penalty": (_real(1e-6, 1e6), "a number > 0, from 1e-6 to 1e6 (1 is off)"),
    "presence_penalty": (_real(-_MAX_NUMBER, _MAX_NUMBER), "a finite number"),
    "frequency_penalty": (_real(-1e20, 1e20), "a finite number"),
    "logit_bias": (_biases, "a mapping of token ids to numbers (-inf bans a token)"),
    "seed": (_int(0, 2**64 - 1, none=True), "a whole number from 0 to 2^64 - 1, or None"),
    "stop": (_strings, "a string or a list of non-empty strings"),
    "stop_token_ids": (_ids, "a list of token ids"),
    "ignore_eos": (_flag, "True or False"),
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
# generation_config.json fields that would change what is generated and that are not supported, with the values
# under which they do nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}


def unsupported_settings(generation_config: Mapping[str, Any]) -> list[str]:
    """Fields of a generation_config.json that ask for what cuplama does not do, as ``name = value``."""
    given = {k: generation_config.get(k) for k in _UNSUPPORTED}
    return [f"{k} = {v!r:.60}" for k, v in given.items() if v not in _UNSUPPORTED[k]]


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a model's generation_config.json sets.

    ``do_sample: false`` means greedy whatever else the file says; a file that says nothing of sampling means greedy
    too, as in transformers. Raises ParameterError for a value that no parameter can have.
    """
    found = {ours: generation_config[k] for k, ours in _GENERATION_KEYS.items() if generation_config.get(k) is not None}
    sampling = generation_config.get("do_sample")
    if sampling is None:
        sampling = "temperature" in found or "top_p" in found
    if not isinstance(sampling, bool):
        raise ParameterError(f"do_sample = {sampling!r:.80} is out of range; it must be true or false")
    if sampling:
        found = {"temperature": 1.0, **found}
    else:
        found = {k: v for k, v in found.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
    SamplingParams(**found)
    return found


PARAMETERS = tuple(f.name for f in fields(SamplingParams))
