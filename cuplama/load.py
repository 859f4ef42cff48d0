"""TODO: load."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .backends import Backend
from .device import open_backend
from .dtypes import Array
from .engine.engine import Engine
from .errors import ConfigError, ParameterError
from .folders import data_folder
from .model import Model, Settings, log
from .models.checkpoint import load_weights
from .models.config import ModelConfig, load_config, read_json
from .quant.weight import Weight
from .text.tokenizer import Tokenizer

__all__ = ["DEFAULT_CONTEXT", "LoadProgress", "find_model", "load", "start_engine"]

LoadProgress = Callable[[int, int], None]  # (bytes loaded, bytes in all)
DEFAULT_CONTEXT = 8192  # of a model that allows more: bounds the cache until --context asks for more


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    cache_tokens: int | None = None,
    offline: bool = False,
    progress: LoadProgress | None = None,
) -> Model:
    """Load a model.

    model: a folder in Hugging Face layout, a hub id ("org/name"), or None for the bundled story model.
    device: "cuda", "numpy", or "auto": CUDA where it works, else NumPy with a notice on the ``cuplama`` logger.
    dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's on CUDA, float32 on NumPy.
    context: tokens a sequence may have; by default the model's own limit, at most 8192.
    cache_tokens: tokens that all sequences of a batch may have together in the KV cache; by default ``context``.
    offline: never ask the hub; use what was downloaded before (as HF_HUB_OFFLINE=1).
    progress: called with (bytes loaded, bytes in all).

    Raises ConfigError, CheckpointError, TokenizerError or DeviceError, each naming the culprit.
    """
    if dtype not in _DTYPE_NAMES:
        raise ParameterError(f"dtype = {dtype!r} is not supported; supported: {', '.join(_DTYPE_NAMES)}")
    folder = find_model(model, offline)
    config = load_config(folder)
    length = context_length(config, context)
    tokens = _cache_tokens(length, cache_tokens)
    if length > config.context and any(rope.type != "dynamic" for rope in config.ropes.values()):
        log.warning("a context of %d tokens is more than the %d that the model was made for", length, config.context)
    path = folder / "generation_config.json"
    generation_config = read_json(path) if path.exists() else {}
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    settings = Settings.read(folder, config, tokenizer, generation_config)
    weights = load_weights(folder, config)
    engine = start_engine(config, weights, device, dtype, length, tokens, progress)
    return Model(folder, config, tokenizer, engine, settings)


def start_engine(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    device: str,
    dtype: str,
    context: int,
    cache_tokens: int,
    progress: LoadProgress | None = None,
) -> Engine:
    """Load the weights onto a device, with a cache of ``cache_tokens`` tokens. The arguments are those of ``load``.

    Raises DeviceError, CheckpointError.
    """
    backend = open_backend(device, _DTYPE_NAMES[dtype], config, weights, context, cache_tokens)
    try:
        return Engine(backend, config, _upload(backend, weights, progress), context, cache_tokens)
    except BaseException:
        backend.close()
        raise


_DTYPE_NAMES = {
    "auto": "auto",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp32": "f32",
    "fp16": "f16",
    "bf16": "bf16",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")


def find_model(model: str | os.PathLike[str] | None, offline: bool = False) -> Path:
    """The folder of a model: the bundled one, a local folder, or the local copy of a hub repository."""
    if model is None:
        return data_folder("weights")
    try:
        path = Path(model or "?").expanduser()  # an empty name must not mean the current folder
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as e:  # no permission, a name too long, no such home folder
        raise ConfigError(f"cannot open {model!s:.80}: {getattr(e, 'strerror', None) or e}") from None
    if exists:
        raise ConfigError(f"{path} is a file; give the folder that holds config.json and the weights")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{str(model)!r:.200} does not exist, and is not a hub id of the form org/name")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = offline or constants.HF_HUB_OFFLINE

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES), local_files_only=offline))
    except LocalEntryNotFoundError:
        why = (
            "it is not in the local cache, and the hub is off limits (offline)"
            if offline
            else "the hub cannot be reached"
        )
        raise ConfigError(f"{model}: no such folder, and as a hub id: {why}") from None
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise ConfigError(f"{model}: no such folder, and the hub says: {str(e).splitlines()[0]}") from None


_POSITIONS = 2**30  # positions are int32, with room for a page more


def context_length(config: ModelConfig, asked: int | None) -> int:
    if asked is None:
        return min(config.context, DEFAULT_CONTEXT)
    asked = _tokens("context", asked)
    if not config.ropes and asked > config.context:
        raise ConfigError(f"context {asked} is more than the {config.context} positions that the model learned")
    return asked


def _tokens(name: str, value: Any) -> int:
    """A whole number of tokens. Raises ParameterError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= _POSITIONS:
        raise ParameterError(f"{name} = {value!r:.80} is out of range; it must be a number from 1 to {_POSITIONS}")
    return int(value)


def _cache_tokens(context: int, asked: int | None) -> int:
    return context if asked is None else max(context, _tokens("cache_tokens", asked))


def _upload(backend: Backend, weights: Mapping[str, Weight], progress: LoadProgress | None) -> dict[str, Array]:
    """Load every weight; one that goes by two names (a tied head) is loaded once."""
    unique = {w.source: w for w in weights.values()}
    total, done = sum(w.nbytes for w in unique.values()), 0
    loaded: dict[tuple[str, ...], Array] = {}
    for source, weight in unique.items():
        loaded[source] = backend.load_weight(weight)
        done += weight.nbytes
        if progress is not None:
            progress(done, total)
    backend.end_loading()
    return {name: loaded[w.source] for name, w in weights.items()}
