"""generation_config.json: what a model brings for generating. What is not supported there is named in a warning.

The fields, the values under which they do nothing, and what stands for absent ones are those of transformers 5.24
(``GenerationConfig`` and its ``_get_default_generation_params``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import checked, flag
from .errors import ConfigError, ParameterError
from .files import read_optional_json
from .gguf import is_gguf, open_gguf
from .models.config import ModelConfig, token_ids
from .sampling_params import SamplingParams, read_parameter
from .text.tokenizer import Tokenizer

__all__ = ["Settings", "params_over", "sampling_defaults", "stop_tokens", "unsupported_settings"]

_log = logging.getLogger("cuplama")
# Names of the sampling parameters that the file may set, and what they are called here.
_SUPPORTED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# What a model that samples has where its file says nothing, unlike SamplingParams.
_SAMPLED = {"temperature": 1.0, "top_k": 50}
# Those that only matter where tokens are sampled, with the values that say nothing: off, or transformers' default.
_SHAPE_THE_DRAW: Mapping[str, tuple[float, ...]] = {
    "temperature": (1,),
    "top_k": (0, -1, 50),
    "top_p": (1,),
    "min_p": (0,),
}
# Fields that are read elsewhere, or that say nothing about the text of one sequence that is not searched with beams.
_HARMLESS = frozenset(
    {
        *("do_sample", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("transformers_version", "_from_model_config", "_commit_hash"),
        # The cache, compilation and memory.
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
        *("prefill_chunk_size", "compile_config", "disable_compile", "low_memory", "continuous_batching_config"),
        # What generate returns beside the tokens.
        *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        # Scores of beams; num_beams itself is named. Draws do not change when logits are normalised.
        *("early_stopping", "length_penalty", "diversity_penalty", "renormalize_logits"),
        # Logits that are not finite are refused here.
        "remove_invalid_values",
        # Drafts of speculative decoding, which do not change what is drawn.
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "speculation_type", "use_mtp"),
    }
)
# Fields that do nothing with this number. Every field does nothing with these: null, false, and what is empty.
_NEUTRAL: Mapping[str, float] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "min_length": 0,
    "guidance_scale": 1,
}
_EMPTY: tuple[Any, ...] = ([], {}, "")


@dataclass(frozen=True)
class Settings:
    """What a model brings for generating: sampling defaults, the ids that end a text, and BOS if it has one."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    bos: int | None = None

    @classmethod
    def read(cls, folder: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> Settings:
        """From what the files of a folder say, or the metadata of a GGUF file.

        Raises ConfigError; logs a warning for what is not supported.
        """
        where, generation_config = _read(folder)
        try:
            defaults = sampling_defaults(generation_config)
        except ParameterError as e:
            raise ConfigError(f"{where}: {e}") from None
        for setting in unsupported_settings(generation_config, config.context):
            _log.warning("%s: %s is not supported and is left out", where, setting)
        if unused := _unused_settings(generation_config):
            _log.warning("%s: without do_sample = true the default is greedy; left out: %s", where, ", ".join(unused))
        if tokenizer is None and defaults.pop("stop", None):
            _log.warning("%s: stop_strings need a tokenizer.json and are left out", where)
        bos = tokenizer.bos if tokenizer is not None and tokenizer.bos is not None else config.bos
        return cls(
            defaults,
            stop_tokens(config, generation_config, tokenizer, where),
            bos if bos is not None and bos < config.vocab_size else None,
        )


def _read(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """(the file that says it, for errors; the content of a generation_config.json)."""
    if is_gguf(folder):
        from .models.gguf import gguf_generation

        return folder, gguf_generation(open_gguf(folder))
    where = folder / "generation_config.json"
    return where, read_optional_json(where)


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a generation_config.json sets, by their names here.

    As in transformers: without ``do_sample: true`` the model is greedy whatever else the file says; with it, what is
    absent is temperature 1 and top_k 50, and ``top_k: 0`` turns that off. Raises ParameterError for a value that no
    parameter can have.
    """
    given = {ours: generation_config[k] for k, ours in _SUPPORTED.items() if generation_config.get(k) is not None}
    found = {name: read_parameter(name, value) for name, value in given.items()}
    if _samples(generation_config):
        return {**_SAMPLED, **found}
    return {name: value for name, value in found.items() if name not in _SHAPE_THE_DRAW}


def params_over(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a call: options take the place of the model's defaults. Raises ParameterError.

    A model's own least length ends where the call's largest begins, as in transformers: it never makes a call fail.
    """
    params = {**defaults, **options}
    most = params.get("max_tokens", SamplingParams.max_tokens)
    if "min_tokens" in defaults and "min_tokens" not in options and isinstance(most, int):
        params["min_tokens"] = min(defaults["min_tokens"], max(most, 0))
    return SamplingParams(**params)


def unsupported_settings(generation_config: Mapping[str, Any], context: int) -> list[str]:
    """Fields of a generation_config.json that ask for what cuplama does not do, or that nobody knows: ``name = value``.

    context: the positions that the model was made for; a max_length of so many tokens, the prompt's included, says
    nothing new.
    """
    known = _HARMLESS | _SUPPORTED.keys()
    asked = {k: v for k, v in generation_config.items() if k not in known and not _is_neutral(k, v)}
    length = asked.get("max_length")
    if isinstance(length, int) and length >= context:
        del asked["max_length"]
    return [f"{k} = {v!r:.60}" for k, v in asked.items()]


def stop_tokens(
    config: ModelConfig, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None, where: Path
) -> frozenset[int]:
    """The ids that end a text: the union of what config, generation_config and tokenizer name.

    where: the generation_config's path, for errors. Raises ConfigError.
    """
    eos = token_ids(generation_config.get("eos_token_id"), f"{where}: eos_token_id")
    own = tokenizer.eos if tokenizer else None
    stops = {*config.eos, *eos, *([] if own is None else [own])}
    # Ids beyond the vocabulary, left over from a larger one, can be neither drawn nor fed.
    return frozenset(t for t in stops if t < config.vocab_size)


def _samples(generation_config: Mapping[str, Any]) -> bool:
    sampling = generation_config.get("do_sample")
    return sampling is not None and checked("do_sample", sampling, flag, "true or false")


def _is_neutral(name: str, value: Any) -> bool:
    return value is None or value is False or value in _EMPTY or value == _NEUTRAL.get(name)


def _unused_settings(generation_config: Mapping[str, Any]) -> list[str]:
    """What the file says of sampling while it does not say whether to sample. ``do_sample: false`` is an answer."""
    if generation_config.get("do_sample") is not None:
        return []
    given = {k: generation_config[k] for k in _SHAPE_THE_DRAW if generation_config.get(k) is not None}
    return [f"{k} = {v!r:.20}" for k, v in given.items() if v not in _SHAPE_THE_DRAW[k]]
