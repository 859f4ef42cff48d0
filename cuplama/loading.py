"""From a name to a model that runs: folder, GGUF file or hub id -> config -> weights -> backend -> engine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .arguments import checked, flag, one_of, whole_number
from .backends import Backend
from .device import ACTIVATIONS, DEVICES, Setup, open_backend
from .dtypes import Array
from .engine.engine import MAX_RUNNING, Engine
from .engine.kv_cache import KV_CACHE_DTYPES, MAX_TOKENS
from .errors import ConfigError
from .generation_config import Settings
from .gguf import held_open
from .hub import BUNDLED, find_model
from .model import Model
from .models.checkpoint import load_weights
from .models.config import ModelConfig, load_config
from .models.peft import load_adapter
from .models.rounding import round_weights
from .quant.grid import GRIDS
from .quant.weight import Weight
from .text.tokenizer import Tokenizer

__all__ = ["DEFAULT_CONTEXT", "DTYPE_NAMES", "LoadProgress", "cache_size", "context_length", "load", "start_engine"]

_log = logging.getLogger("cuplama")
LoadProgress = Callable[[int, int], None]  # (bytes loaded, bytes in all)
DEFAULT_CONTEXT = 8192  # tokens, of a model that allows more: bounds the cache until --context asks for more
# What a caller may ask for -> the short name that backends and ops use. "auto" is decided where the device is known.
DTYPE_NAMES: Mapping[str, str] = {
    "auto": "auto",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp32": "f32",
    "fp16": "f16",
    "bf16": "bf16",
}

_WORDS: Mapping[str, Collection[str]] = {
    "dtype": DTYPE_NAMES,
    "device": DEVICES,
    "quantize": GRIDS,
    "activations": ACTIVATIONS,
    "kv_cache_dtype": KV_CACHE_DTYPES,
}


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    context: int | None = None,
    cache_tokens: int | str | None = None,
    kv_cache_dtype: str = "auto",
    activations: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    deterministic: bool = False,
    max_running: int | None = None,
    max_waiting: int | None = None,
    prefix_cache: bool = True,
    offline: bool = False,
    progress: LoadProgress | None = None,
) -> Model:
    """Load a model.

    model: a folder in Hugging Face layout, a GGUF file or a folder that holds one, a hub id ("org/name",
    "org/name@revision", or "org/name:Q4_K_M" for one of several GGUF files), or None for the bundled story model.
    device: "cuda", "numpy", or "auto": CUDA where it works, else NumPy with a notice on the ``cuplama`` logger.
    dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's on CUDA, float32 on NumPy.
    quantize: "int4", "int8" or "fp8": the layers' matrices are quantised while they are loaded, each number to the
    nearest. Embedding and head stay as they are.
    context: tokens a sequence may have; by default the model's own limit, at most 8192.
    cache_tokens: tokens that all sequences of a batch may have together in the KV cache; by default ``context``. "auto"
    takes as many as there is room for. On CUDA that is 90% of the memory that is free beside weights and workspace; on
    NumPy eight sequences of full length, in at most a quarter of the free memory.
    kv_cache_dtype: "fp8" stores keys and values as 8-bit floats (e4m3, without scales): half the bytes of 16 bits, so
    that more tokens fit and long texts are generated faster, at some precision. "auto" stores the model's dtype.
    activations: "fp8" rounds what is multiplied with fp8 weights to fp8 (e4m3) as well, in passes of more than 64 rows
    (tokens or sequences): faster on GPUs of compute capability 9.0, and less precise. "auto" does not.
    adapter: a folder or hub id of a LoRA adapter as PEFT saves it, which is applied beside the model's weights.
    deterministic: a text's logits are the same bit for bit whatever is computed beside it, however its prompt is cut,
    and whether its tokens are read or were generated. On CUDA alone, and slower.
    max_running, max_waiting: sequences that run at a time, 256 by default, or as many as have room for their states;
    and that may wait beside them, any number by default; more are refused with BusyError.
    prefix_cache: what a prompt has in common with earlier ones, in whole pages of 64 tokens, is not computed again.
    offline: never ask the hub; use what was downloaded before (as HF_HUB_OFFLINE=1).
    progress: called with (bytes loaded, bytes in all).

    Raises ParameterError, ConfigError, CheckpointError, TokenizerError or DeviceError, each naming the culprit.
    """
    _check_words(dtype=dtype, device=device, quantize=quantize, activations=activations, kv_cache_dtype=kv_cache_dtype)
    how = _how(deterministic, prefix_cache, max_running, max_waiting)
    folder = find_model(model, checked("offline", offline, flag, "True or False"))
    with held_open(folder):
        config = load_config(folder)
        length, tokens = _sizes(config, context, cache_tokens)
        tokenizer = Tokenizer.find(folder)
        settings = Settings.read(folder, config, tokenizer)
        weights = _weights(folder, config, quantize)
    name = BUNDLED if model is None else os.fspath(model)
    if adapter is not None:
        config, weights = _adapted(config, weights, find_model(adapter, offline), name)
    setup = Setup(device, DTYPE_NAMES[dtype], length, tokens, kv_cache_dtype, activations, **how)
    engine = start_engine(config, weights, setup, progress)
    return Model(folder, config, tokenizer, engine, settings, name, None if adapter is None else os.fspath(adapter))


def _check_words(**given: Any) -> None:
    """Raises ParameterError unless each argument is one of its words."""
    for name, value in given.items():
        if name != "quantize" or value is not None:
            one_of(name, value, _WORDS[name])


def _how(deterministic: Any, prefix_cache: Any, max_running: int | None, max_waiting: int | None) -> dict[str, Any]:
    """These fields of a Setup. Raises ParameterError."""
    switches = {"deterministic": deterministic, "prefix_cache": prefix_cache}
    how: dict[str, Any] = {name: checked(name, on, flag, "True or False") for name, on in switches.items()}
    running = checked("max_running", max_running, whole_number(1, none=True), "a whole number >= 1, or None")
    waiting = checked("max_waiting", max_waiting, whole_number(0, none=True), "a whole number >= 0, or None")
    return {**how, "max_running": MAX_RUNNING if running is None else running, "max_waiting": waiting}


def _sizes(config: ModelConfig, context: int | None, cache_tokens: int | str | None) -> tuple[int, int | None]:
    """Tokens of a sequence, and of the cache as ``cache_size`` gives them. Raises ParameterError and ConfigError."""
    length = context_length(config, context)
    tokens = cache_size(length, cache_tokens)
    if length > config.context and any(rope.type != "dynamic" for rope in config.ropes.values()):
        _log.warning("a context of %d tokens is more than the %d that the model was made for", length, config.context)
    return length, tokens


def _weights(folder: Path, config: ModelConfig, quantize: str | None) -> Mapping[str, Weight]:
    weights = load_weights(folder, config)
    return weights if quantize is None else round_weights(weights, config, quantize)


def _adapted(
    config: ModelConfig, weights: Mapping[str, Weight], adapter: Path, name: str
) -> tuple[ModelConfig, dict[str, Weight]]:
    """The model with an adapter. A warning says so where that names another model; copies may lie anywhere."""
    adapted, more = load_adapter(adapter, config)
    base = adapted.adapter.base if adapted.adapter is not None else ""
    made_for, given = (re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower() for text in (base, name))
    if base and made_for != given and base != config.raw.get("_name_or_path"):
        _log.warning("the adapter was made for %s, and is applied to %s", base, name)
    return adapted, {**weights, **more}


def start_engine(
    config: ModelConfig, weights: Mapping[str, Weight], setup: Setup, progress: LoadProgress | None = None
) -> Engine:
    """An engine with the weights on a device, as ``setup`` says.

    Raises ParameterError, DeviceError, CheckpointError; nothing stays on the device then.
    """
    backend, room = open_backend(setup, config, weights)
    try:
        loaded = _upload(backend, weights, progress)
        return Engine(
            backend,
            config,
            loaded,
            setup.context,
            room.tokens,
            setup.kv_cache_dtype,
            setup.max_running,
            setup.max_waiting,
            setup.prefix_cache,
            room.slots,
        )
    except BaseException:
        backend.close()
        raise


def context_length(config: ModelConfig, asked: int | None) -> int:
    """Tokens that a sequence may have: what was asked for, or the model's own limit, at most ``DEFAULT_CONTEXT``.

    Rotary positions go on beyond the model's limit, learned ones do not. Raises ParameterError for what is no number of
    tokens, and ConfigError for more than the positions that a model learned.
    """
    if asked is None:
        return min(config.context, DEFAULT_CONTEXT)
    asked = _tokens("context", asked)
    if not config.ropes and asked > config.context:
        raise ConfigError(f"context {asked} is more than the {config.context} positions that the model learned")
    return asked


def _tokens(name: str, value: Any, also: str = "") -> int:
    """A whole number of tokens. also: what else it may be. Raises ParameterError."""
    return int(checked(name, value, whole_number(1, MAX_TOKENS), f"a number from 1 to {MAX_TOKENS}{also}"))


def cache_size(context: int, asked: int | str | None) -> int | None:
    """Tokens of the cache, those of one sequence at least; None for as many as there is room for, which is "auto".

    Raises ParameterError for what is neither "auto" nor a number of tokens.
    """
    if asked == "auto":
        return None
    return context if asked is None else max(context, _tokens("cache_tokens", asked, ', or "auto"'))


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
