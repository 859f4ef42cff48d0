"""What a training begins with: a new model of a config, or one that was trained before."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ParameterError, TokenizerError
from ..files import read_json
from ..generation_config import Settings
from ..gguf import is_gguf
from ..models import new_adapter
from ..models.checkpoint import load_weights
from ..models.config import ModelConfig, load_config, parse_config
from ..models.lora import ALL_LINEAR
from ..quant.weight import Weight
from ..text.tokenizer import Tokenizer
from .initial import initial_weights
from .marks import Marks
from .model_files import AdapterFiles, ModelFiles, files_of_folder, files_of_new_model
from .settings import TrainingSettings

__all__ = ["Origin", "new_model", "trained_model"]

_log = logging.getLogger("cuplama")


@dataclass(frozen=True)
class Origin:
    """config: whose ``tied`` is known, with the adapters that are to be trained; weights: by canonical name; files: of
    the folder that is saved to; fingerprint: of config and weights."""

    config: ModelConfig
    weights: Mapping[str, Weight | np.ndarray[Any, Any]]
    tokenizer: Tokenizer
    marks: Marks
    files: ModelFiles | AdapterFiles
    fingerprint: str


def new_model(config_file: Path, tokenizer_file: Path, seed: int) -> Origin:
    """A model with its first weights, drawn from the seed.

    tokenizer_file: a tokenizer.json; the files beside it count as well if that is its name. Raises ConfigError,
    TokenizerError.
    """
    if config_file.is_dir():
        raise ConfigError(f"{config_file} is a folder; a new model is made from a file, a config.json")
    raw = read_json(config_file)
    if raw.get("quantization_config") is not None:
        raise ConfigError(f"{config_file}: quantization_config: the weights of a new model are not quantised")
    config = parse_config(raw, str(config_file))
    tied = config.head_is_tied
    config = replace(config, tied=tied)
    if tokenizer_file.is_dir():
        tokenizer_file = tokenizer_file / "tokenizer.json"
    if is_gguf(tokenizer_file):
        raise TokenizerError(f"{tokenizer_file} is a GGUF file; a new model needs a tokenizer.json")
    tokenizer = Tokenizer.load(tokenizer_file)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{config_file}: vocab_size = {config.vocab_size} is less than the {tokenizer.vocab_size} tokens of"
            f" {tokenizer_file}"
        )
    marks = Marks.of(tokenizer, config)
    for key, id in (("bos_token_id", config.bos), *(("eos_token_id", id) for id in config.eos)):
        if id is not None and id not in tokenizer.special_ids:
            shown = tokenizer.token_shown(id)
            _log.warning("%s: %s = %d is %s, no special token, and is left out", config_file, key, id, shown)
    files = files_of_new_model(config, tied, tokenizer_file, tokenizer, marks)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return Origin(config, initial_weights(config, seed), tokenizer, marks, files, digest)


def trained_model(folder: Path, name: str, settings: TrainingSettings) -> Origin:
    """A model of a folder, or where only adapters are trained of a GGUF file. name: what it is called elsewhere.

    Raises ConfigError, CheckpointError, TokenizerError, and ParameterError for a model that is quantised and for
    modules that it does not have.
    """
    config, gguf, adapters = load_config(folder), is_gguf(folder), settings.lora > 0
    if gguf and not adapters:
        raise ConfigError(f"{folder} is a GGUF file: only adapters of it can be trained (--lora)")
    tokenizer = Tokenizer.load(folder)
    weights = load_weights(folder, config)
    packed = next((w for w in weights.values() if w.packed), None)
    if packed is not None and not adapters:
        raise ParameterError(f"{folder} is quantised ({packed.source[0]}): only adapters of it can be trained (--lora)")
    tied = weights["lm_head"].source == weights["embed_tokens"].source
    config = replace(config, tied=tied)
    marks = Marks.of(tokenizer, config, Settings.read(folder, config, tokenizer).stop_ids)
    fingerprint = _fingerprint(config, weights)
    if not adapters:
        return Origin(config, weights, tokenizer, marks, files_of_folder(folder, config, tied), fingerprint)
    adapted = _with_adapter(config, settings)
    first = new_adapter.initial_weights(adapted, settings.seed)
    return Origin(adapted, {**weights, **first}, tokenizer, marks, AdapterFiles(adapted, name), fingerprint)


def _with_adapter(config: ModelConfig, settings: TrainingSettings) -> ModelConfig:
    """The model with a new adapter. Raises ParameterError that begins with the name of a setting."""
    alpha = 2.0 * settings.lora if settings.lora_alpha is None else settings.lora_alpha
    try:
        return new_adapter.new_adapter(config, settings.lora, alpha, settings.lora_targets or ALL_LINEAR)
    except ParameterError as e:
        raise ParameterError(f"lora_{e}") from None


def _fingerprint(config: ModelConfig, weights: Mapping[str, Weight]) -> str:
    """A SHA-256 of the config, and of each tensor's name, shape and first row."""
    digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True, default=str).encode())
    for weight in weights.values():
        digest.update(repr((weight.name, weight.source, weight.shape)).encode())
        for part in weight.parts:
            if isinstance(part, np.ndarray):
                digest.update(np.ascontiguousarray(part[:1]).tobytes())
    return digest.hexdigest()
