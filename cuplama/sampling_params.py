"""Sampling parameters: what they mean, their defaults, and the checks on them. The arithmetic is in ops/sampling.py."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from .arguments import checked, flag, in_range, items, need_type, real, type_of, whole, whole_number
from .errors import ParameterError
from .output_form import MAX_TEXT, asked_form, check_one_form, read_form, read_schema

__all__ = [
    "OPTIONS",
    "PARAMETERS",
    "SamplingOptions",
    "SamplingParams",
    "allowed_values",
    "given_options",
    "read_parameter",
]


class SamplingOptions(TypedDict, total=False):
    """Keywords of ``generate`` and others: the fields of SamplingParams, and response_format, which stands for one.

    response_format: as OpenAI's API has it, {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", ...}.
    """

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
    show_special: bool | Sequence[int]
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | str | bool | None
    regex: str | None
    grammar: str | None
    response_format: Mapping[str, Any] | None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop. Raises ParameterError (a ValueError) naming what cannot be.

    The order is that of Hugging Face: penalties, logit_bias, min_tokens, temperature, top_k, top_p, min_p.

    max_tokens: tokens to generate at most, no fewer than min_tokens; None: until the context is full.
    min_tokens: stop tokens cannot be drawn before this many tokens.
    temperature: 0 is greedy.
    top_k: keep the k largest; 0 is off, and so is -1, which is kept as 0.
    top_p: keep the most probable tokens that together reach p; 1 is off.
    min_p: keep tokens with at least min_p times the largest probability; 0 is off.
    repetition_penalty: divides (or multiplies, if negative) the logits of tokens in the prompt or the text; 1 is off
    (Keskar et al., arXiv:1909.05858). presence_penalty, frequency_penalty: subtracted once, or per occurrence, for
    tokens in the generated text.
    logit_bias: token id -> value added to its logit.
    seed: None draws one; of n choices of a prompt choice i has seed + i. The draw depends on seed, position and logits
    alone: the same seed gives the same text, and also in a batch and on other backends, as far as the logits are the
    same there; they are to rounding.
    stop: strings that end the text (and are not part of it). stop_token_ids: further stop tokens.
    ignore_eos: do not stop at the model's own stop tokens.
    show_special: special tokens are part of the text: all (True), none, or those of these ids. A stop token never is.
    logprobs: None for none, 0 for the chosen token's, n for the n most probable besides. prompt_logprobs: the same for
    each token of the prompt.
    json_schema: the text is JSON of this schema: a mapping, JSON text, or True for any object. regex: the whole text
    matches. grammar: in Lark's or llama.cpp's (GBNF) notation. At most one of the three; see docs/structured.md.
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
    show_special: bool | Sequence[int] = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | bool | None = None  # kept as a mapping, or None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name in _RULES:
            object.__setattr__(self, name, read_parameter(name, getattr(self, name)))
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ParameterError(f"max_tokens = {self.max_tokens} is less than min_tokens = {self.min_tokens}")
        check_one_form(self)

    def with_seed(self) -> int:
        """The seed, or a fresh one from the operating system.

        A fresh one is below 2^53, so that every reader of JSON keeps it, those too that take numbers for doubles.
        """
        return int.from_bytes(os.urandom(8), "little") >> 11 if self.seed is None else self.seed

    def choices(self, n: int = 1) -> list[SamplingParams]:
        """The parameters of n choices of one prompt, each with the seed that it uses.

        Choice i has seed + i, modulo 2^64, counted from the given seed or from a fresh one.
        """
        seed = self.with_seed()
        return [self._with_seed(seed + i) for i in range(n)]

    def _with_seed(self, seed: int) -> SamplingParams:
        # dataclasses.replace would check every parameter again: 75 us, which a batch pays for each of its prompts.
        found = copy.copy(self)
        object.__setattr__(found, "seed", seed % 2**64)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Every parameter as plain data for JSON, which ``from_dict`` reads again.

        JSON's keys are strings and it has no infinity: logit_bias is spelt ``{"42": 1.5, "43": "-inf"}``.
        """
        bias = {str(id): "-inf" if value == -math.inf else value for id, value in self.logit_bias.items()}
        lists = {"stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}
        if not isinstance(self.show_special, bool):
            lists["show_special"] = list(self.show_special)
        return {**{name: getattr(self, name) for name in PARAMETERS}, **lists, "logit_bias": bias}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The parameters that ``to_dict`` wrote; one that is left out has its default. Raises ParameterError."""
        if not isinstance(values, Mapping):
            raise ParameterError(f"sampling parameters are a mapping of names to values, and not {type_of(values)}")
        _check_names(values, PARAMETERS)
        bias = values.get("logit_bias", {})
        if isinstance(bias, Mapping):
            bias = {_id(key): -math.inf if value == "-inf" else value for key, value in bias.items()}
        return cls(**{**values, "logit_bias": bias})


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters from SamplingOptions. Raises ParameterError naming a key that is none of them."""
    _check_names(options, OPTIONS)
    return asked_form(options)


def _check_names(values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            raise ParameterError(f"{name} is not a sampling parameter; there are: {', '.join(known)}")


def read_parameter(name: str, value: Any) -> Any:
    """A parameter's value in plain Python types. Raises ParameterError naming a wrong type or what is out of range."""
    return checked(name, value, *_RULES[name])


def allowed_values(name: str) -> str:
    """What values a parameter takes, in words."""
    return _RULES[name][1]


def _id(key: Any) -> Any:
    """A token id from a key of JSON; anything else stays as it is, and is refused with its own words."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


def _temperature(value: Any) -> float:
    number = real(0, _MAX_NUMBER)(value)
    return number if number >= 1e-6 else 0.0  # below, float32 logits cannot tell it from greedy


def _top_k(value: Any) -> int:
    number = whole(value)
    in_range(number >= -1)
    return max(number, 0)


def _strings(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else () if value is None else items(value)
    for string in found:
        need_type(isinstance(string, str), string)
        in_range(string != "")
    return found


def _ids(value: Any) -> tuple[int, ...]:
    found = () if value is None else tuple(whole(i) for i in items(value))
    in_range(all(i >= 0 for i in found))
    return found


def _flag_or_ids(value: Any) -> bool | tuple[int, ...]:
    return bool(value) if isinstance(value, bool) else _ids(value)


def _biases(value: Any) -> dict[int, float]:
    need_type(value is None or isinstance(value, Mapping), value)
    found = {whole(id): _bias(bias) for id, bias in (value or {}).items()}
    in_range(all(id >= 0 for id in found))
    return found


def _bias(value: Any) -> float:
    banned = isinstance(value, float) and value == -math.inf
    return -math.inf if banned else real(-_MAX_NUMBER, _MAX_NUMBER)(value)


_MAX_NUMBER = 1e30  # the sampler computes in float32, and sums and quotients of what is allowed must stay finite
# Parameter -> (reader, what it takes). A reader returns the value in plain Python types, or raises.
_RULES: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "max_tokens": (whole_number(0, none=True), "a whole number >= 0, or None"),
    "min_tokens": (whole_number(0), "a whole number >= 0"),
    "temperature": (_temperature, "a number >= 0"),
    "top_k": (_top_k, "a whole number >= 0 (0 is off)"),
    "top_p": (real(0, 1), "a number from 0 to 1 (1 is off)"),
    "min_p": (real(0, 1), "a number from 0 to 1 (0 is off)"),
    "repetition_penalty": (real(1e-6, 1e6), "a number > 0, from 1e-6 to 1e6 (1 is off)"),
    "presence_penalty": (real(-_MAX_NUMBER, _MAX_NUMBER), "a finite number"),
    "frequency_penalty": (real(-1e20, 1e20), "a finite number"),
    "logit_bias": (_biases, "a mapping of token ids to numbers (-inf bans a token)"),
    "seed": (whole_number(0, 2**64 - 1, none=True), "a whole number from 0 to 2^64 - 1, or None"),
    "stop": (_strings, "a string or a list of non-empty strings"),
    "stop_token_ids": (_ids, "a list of token ids"),
    "ignore_eos": (flag, "True or False"),
    "show_special": (_flag_or_ids, "True or False, or a list of token ids"),
    "logprobs": (whole_number(0, 64, none=True), "a whole number from 0 to 64, or None"),
    "prompt_logprobs": (whole_number(0, 64, none=True), "a whole number from 0 to 64, or None"),
    "json_schema": (read_schema, "a JSON schema as a mapping or as text, True for any object, or None"),
    "regex": (read_form, f"a regular expression of 1 to {MAX_TEXT} characters, or None"),
    "grammar": (read_form, f"a grammar of 1 to {MAX_TEXT} characters, or None"),
}
PARAMETERS = tuple(f.name for f in fields(SamplingParams))
OPTIONS = (*PARAMETERS, "response_format")  # the keywords of a call
