"""What a training begins with: a new model of a config, or one that was trained before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, ParameterError, TokenizerError
from ..files import read_json
from ..generation_config import Settings
from ..gguf import is_gguf
from ..models.checkpoint import load_weights
from ..models.config import ModelConfig, load_config, parse_config
from ..quant.weight import Weight
from ..text.tokenizer import Tokenizer
from .initial import head_is_tied, initial_weights
from .marks import Marks
from .model_files import ModelFiles, files_of_folder, files_of_new_model

__all__ = ["Origin", "new_model", "trained_model"]


@dataclass(frozen=True)
class Origin:
    """config: whose ``tied`` is known; weights: by canonical name; files: of the folder that the model is saved to, or
    None where only adapters are trained; fingerprint: of config and weights; name: how the model was named."""

    config: ModelConfig
    weights: Mapping[str, Weight]
    tokenizer: Tokenizer
    marks: Marks
    files: ModelFiles | None
    fingerprint: str
    name: str


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
    tied = head_is_tied(config)
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
    files = files_of_new_model(config, tied, tokenizer_file, tokenizer, marks)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return Origin(config, initial_weights(config, seed), tokenizer, marks, files, digest, str(config_file))


def trained_model(folder: Path, name: str, adapters: bool) -> Origin:
    """A model of a folder, or of a GGUF file. adapters: whether only adapters are trained, so that it may be quantised.

    Raises ConfigError, CheckpointError, TokenizerError, and ParameterError for a model that is quantised.
    """
    config, gguf = load_config(folder), is_gguf(folder)
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
    files = None if adapters else files_of_folder(folder, config, tied)
    return Origin(config, weights, tokenizer, marks, files, _fingerprint(config, weights), name)


def _fingerprint(config: ModelConfig, weights: Mapping[str, Weight]) -> str:
    """A SHA-256 of the config, and of each tensor's name, shape and first row."""
    digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True, default=str).encode())
    for weight in weights.values():
        digest.update(repr((weight.name, weight.source, weight.shape)).encode())
        for part in weight.parts:
            if isinstance(part, np.ndarray):
                digest.update(np.ascontiguousarray(part[:1]).tobytes())
    return digest.hexdigest()
