"""The fields that every request for text may have: how tokens are drawn, what comes back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import ApiError
from .fields import Field, harmless, own, refused, sampling
from .kinds import ANY_OBJECT, FLAG, Kind, either, integer, listed, number, record, string, table, word

__all__ = ["COMMON", "constraint"]

_TOKEN_ID = integer(0, 2**31 - 1)
_SEED_LOW, _SEED_HIGH = -(2**63), 2**64 - 1


def _read_limit(value: Any) -> int | None:
    """-1, as llama.cpp's clients write it, is no limit."""
    most = integer(-1).read(value)
    return None if most == -1 else int(most)


def _read_seed(value: Any) -> int | None:
    """-1, as llama.cpp's and vLLM's clients write it, draws a seed; other negative ones count from 2^64 downwards."""
    seed = integer(_SEED_LOW, _SEED_HIGH).read(value)
    return None if seed == -1 else int(seed % 2**64)


_LIMIT = Kind(integer(-1).schema, _read_limit, "a whole number >= 0, or -1 for as many as the context has room for")
_SEED = Kind(integer(_SEED_LOW, _SEED_HIGH).schema, _read_seed, "a whole number from -2^63 to 2^64 - 1 (-1 draws one)")
_NEGATED = Kind(FLAG.schema, lambda value: not FLAG.read(value), FLAG.wanted)
_TOP_K = Kind(integer(-1).schema, integer(-1).read, "a whole number >= 0 (0 and -1 are off)")
_BIAS = table(number(), int, "^[0-9]{1,10}$", "an object of token ids to numbers")

# What of structured output is a sampling parameter, by the names of vLLM's fields.
_GUIDED = {
    "json": Kind({}, lambda value: value, "a JSON schema"),
    "json_object": FLAG,
    "regex": string(1),
    "grammar": string(1),
    "choice": listed(string(1), "non-empty strings", 1),
}
_ALONE = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}  # name of a field -> part of the above
_STRUCTURED: tuple[Field, ...] = (
    sampling("response_format", ANY_OBJECT, "The form of the text: text, json_object, or json_schema."),
    own("structured_outputs", record(_GUIDED), "vLLM's form: json, regex, choice, grammar or json_object."),
    *(own(f"guided_{name}", kind, "An older name of a part of structured_outputs.") for name, kind in _GUIDED.items()),
    *(own(name, _GUIDED[kind], "The same, as llama.cpp and SGLang have it.") for name, kind in _ALONE.items()),
    refused("structural_tag", "use response_format"),
    refused("ebnf", "use grammar"),
    refused("guided_whitespace_pattern", "use regex or grammar"),
    refused("guided_decoding_backend", "leave it out", "auto", "llguidance", "guidance"),
)
_DRAW: tuple[Field, ...] = (
    sampling("temperature", number(0), "0 is greedy. Default: the model's own, or 1."),
    sampling("top_p", number(0, 1), "Keep the most probable tokens that together reach p."),
    sampling("top_k", _TOP_K, "Keep the k most probable tokens."),
    sampling("min_p", number(0, 1), "Keep tokens with at least this share of the largest probability."),
    sampling("presence_penalty", number(), "Subtracted from the logits of tokens that were generated."),
    sampling("frequency_penalty", number(-1e20, 1e20), "Subtracted for each time that a token was generated."),
    sampling("repetition_penalty", number(1e-6, 1e6), "Divides the logits of tokens that occurred."),
    sampling("logit_bias", _BIAS, "Token id -> a number that is added to its logit."),
    own("allowed_token_ids", listed(_TOKEN_ID, "token ids", 1), "Nothing but these is drawn."),
    sampling("seed", _SEED, "Of n choices, choice i has seed + i. Default: one is drawn."),
)
_ENDS: tuple[Field, ...] = (
    sampling("max_tokens", _LIMIT, "Tokens to generate at most."),
    sampling("max_completion_tokens", _LIMIT, "The newer name of max_tokens.", to="max_tokens"),
    sampling("min_tokens", integer(0), "No stop token is drawn before so many tokens."),
    sampling("stop", either(string(1), listed(string(1), "non-empty strings")), "Strings that end the text."),
    sampling("stop_token_ids", listed(_TOKEN_ID, "token ids"), "Further tokens that end the text."),
    sampling("ignore_eos", FLAG, "Go on after the model's own stop tokens."),
    refused("include_stop_str_in_output", "the text ends before the stop string", False),
    refused("bad_words", "use logit_bias with -1e30 for the tokens to avoid", []),
)
_BACK: tuple[Field, ...] = (
    own("n", integer(1), "Choices for each prompt.", 1),
    own("best_of", integer(1), "Must be n: nothing is generated to be thrown away."),
    own("stream", FLAG, "Send the text as it is generated, as server-sent events.", False),
    own(
        "stream_options",
        record({"include_usage": FLAG, "continuous_usage_stats": FLAG, "include_obfuscation": FLAG}),
        "include_usage: a last event with the number of tokens. continuous_usage_stats: in every event.",
    ),
    sampling("prompt_logprobs", integer(0, 64), "Log-probabilities of the prompt's tokens, and of the best besides."),
    own("return_token_ids", FLAG, "Return the ids of the prompt and of the text.", False),
    own("return_tokens_as_token_ids", FLAG, 'In logprobs write tokens as "token_id:ID".', False),
    sampling(
        "skip_special_tokens", _NEGATED, "Leave special tokens out of the text: true, or all are shown.", "show_special"
    ),
    harmless("spaces_between_special_tokens", FLAG),
    own("priority", integer(-(2**63), 2**63 - 1), "Lower ones are admitted first.", 0),
)
_OTHERS: tuple[Field, ...] = (
    own("model", string(), "The name of the served model, or none."),
    *(harmless(n, string()) for n in ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")),
    *(harmless(n, string()) for n in ("request_id", "session_id")),
    harmless("service_tier", word("auto", "default", "flex", "scale", "priority"), "There is one."),
    refused("use_beam_search", "tokens are drawn one after the other", False),
    refused("length_penalty", "it belongs to beam search", 1, 1.0),
    refused("early_stopping", "it belongs to beam search", False),
    refused("truncate_prompt_tokens", "shorten the prompt"),
    refused("truncation_side", "shorten the prompt"),
    refused("cache_salt", "start the server without the prefix cache where tenants must not share it"),
    *(refused(name, "use max_tokens") for name in ("max_new_tokens", "n_predict", "num_predict")),
    refused("num_ctx", "start the server with --context"),
    refused("repeat_penalty", "use repetition_penalty", 1, 1.0),
    refused("do_sample", "use temperature"),
    refused("typical_p", "use top_p or min_p", 1, 1.0),
    refused("tfs_z", "use top_p or min_p", 1, 1.0),
    refused("mirostat", "use top_p or min_p", 0),
    refused("no_repeat_ngram_size", "use repetition_penalty", 0),
    refused("logit_processors", "use logit_bias", []),
    refused("logits_processors", "use logit_bias", []),
    refused("logprob_token_ids", "use logprobs"),
    refused("thinking_token_budget", "use max_tokens", -1),
    refused("watermarking", "texts are not marked", False),
    refused("repetition_detection", "use repetition_penalty"),
    refused("prompt_embeds", "use prompt"),
    refused("kv_transfer_params", "there is one engine", {}),
    refused("vllm_xargs", "there are no extensions", {}),
)
COMMON: tuple[Field, ...] = (*_DRAW, *_ENDS, *_BACK, *_STRUCTURED, *_OTHERS)


def constraint(own: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameter that ``structured_outputs`` and its like ask for; {} if none does.

    Raises ApiError 400 where there are several, or parts that nobody knows.
    """
    asked = {f"structured_outputs.{name}": value for name, value in (own["structured_outputs"] or {}).items()}
    asked |= {f"guided_{name}": own[f"guided_{name}"] for name in _GUIDED}
    asked |= {name: own[name] for name in _ALONE}
    found = {name: value for name, value in asked.items() if value is not None and value is not False}
    if len(found) > 1:
        raise ApiError(400, f"{' and '.join(found)} exclude each other", param=next(iter(found)).partition(".")[0])
    for name, value in found.items():
        kind = _ALONE.get(name, name.removeprefix("structured_outputs.").removeprefix("guided_"))
        if kind not in _OPTIONS:
            raise ApiError(
                400, f"{name} is not supported; supported: {', '.join(_OPTIONS)}", param="structured_outputs"
            )
        option, read = _OPTIONS[kind]
        return {option: read(value)}
    return {}


def _one_of(choices: list[str]) -> str:
    """A grammar, in llguidance's form of Lark, of some texts."""
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def _same(value: Any) -> Any:
    return value


# Part of structured_outputs -> the sampling parameter that it becomes, and its value there.
_OPTIONS: Mapping[str, tuple[str, Any]] = {
    "json": ("json_schema", _same),
    "json_object": ("json_schema", _same),
    "regex": ("regex", _same),
    "grammar": ("grammar", _same),
    "choice": ("grammar", _one_of),
}
