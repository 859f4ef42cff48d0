"""Models without a checkpoint: a config and random weights are enough for measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..device import Setup
from ..dtypes import DTYPES
from ..errors import ConfigError, ParameterError
from ..generation_config import Settings
from ..loading import DTYPE_NAMES, cache_size, context_length, load, start_engine
from ..model import Model
from ..models.config import ModelConfig
from ..models.presets import find_shape, is_shape
from ..quant.weight import Weight
from ..text.tokenizer import Tokenizer
from .quantised import layer_formats, layer_matrices
from .random_weights import random_quantised, random_weight

__all__ = ["Source", "dummy_model", "dummy_tokenizer", "dummy_weights"]


@dataclass(frozen=True)
class Source:
    """Which model runs and how.

    model: folder, hub id or a known shape, None for the bundled one; dummy: random weights from its config alone;
    weight_format: one of ``WEIGHT_FORMATS`` for the layers' matrices of random ones, "" for the dtype of the config;
    the others: as of ``load``.
    """

    model: str | None
    dummy: bool = False
    weight_format: str = ""
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    kv_cache_dtype: str = "auto"
    activations: str = "auto"
    deterministic: bool = False
    max_running: int | None = None

    def open(self, context: int | None, cache_tokens: int | str, spelled: bool = False) -> Model:
        """Load the model, or make it up. context, cache_tokens: as of ``load``; spelled: as of ``dummy_model``.

        Raises ParameterError for random weights of no model, ConfigError for a known shape without --dummy-weights.
        """
        if self.dummy:
            if self.model is None:
                raise ParameterError("--dummy-weights needs -m: a folder with a config.json, or a known shape")
            how = {
                "kv_cache_dtype": self.kv_cache_dtype,
                "activations": self.activations,
                "deterministic": self.deterministic,
                **self._running,
            }
            form = self.weight_format
            return dummy_model(self.model, self.device, self.dtype, context, cache_tokens, form, spelled, **how)
        if is_shape(self.model):
            raise ConfigError(f"{self.model} is a known shape without weights; add --dummy-weights")
        return load(
            self.model,
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
            context=context,
            cache_tokens=cache_tokens,
            kv_cache_dtype=self.kv_cache_dtype,
            activations=self.activations,
            deterministic=self.deterministic,
            **self._running,
        )

    @property
    def _running(self) -> dict[str, Any]:
        return {} if self.max_running is None else {"max_running": self.max_running}


def dummy_weights(config: ModelConfig, dtype: np.dtype[Any], form: str = "") -> dict[str, Weight]:
    """Random weights by canonical name, as a checkpoint would give them. Scales of norms are near 1, the rest near 0.

    form: of ``WEIGHT_FORMATS`` for the matrices of the layers, or "". The head shares the embedding's array if the
    config ties them.
    """
    wide = config.wide_weights()
    found = {
        name: random_weight(
            name,
            shape,
            dtype,
            ("embed_tokens",) if name == "lm_head" and config.head_is_tied else (name,),
            1 - config.family.norm_offset if name.endswith(("norm", "scalar")) else 0.0,
            name in wide,
        )
        for name, shape in config.weight_shapes().items()
    }
    for name, (*experts, _, k) in layer_matrices(config, form):
        found[name] = random_quantised(name, k, layer_formats(config, name, form), *experts)
    return found


def dummy_model(
    model: str,
    device: str,
    dtype: str,
    context: int | None,
    cache_tokens: int | str,
    form: str = "",
    spelled: bool = False,
    **more: Any,
) -> Model:
    """A model of that shape with random weights. dtype "auto": what the config states.

    context, cache_tokens: as of ``load``; form: of the layers' matrices; spelled: whether it has a tokenizer, which is
    made up as well; more: other fields of a ``Setup``.
    """
    name, config = find_shape(model)
    weights = dummy_weights(config, DTYPES[config.stored], form)
    length = context_length(config, context)
    setup = Setup(device, DTYPE_NAMES[dtype], length, cache_size(length, cache_tokens), **more)
    engine = start_engine(config, weights, setup)
    tokenizer = dummy_tokenizer(config.vocab_size) if spelled else None
    return Model(Path(name), config, tokenizer, engine, Settings.read(Path(name), config, tokenizer))


def dummy_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer of that many tokens: the bytes, and words of random letters, of which most begin with a
    space. So text costs what that of a real model costs."""
    import tokenizers

    rng = np.random.default_rng(0)
    pieces = dict.fromkeys(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    while len(pieces) < vocab_size:
        word = "".join(rng.choice(letters, rng.integers(2, 8)))
        pieces["Ġ" + word if rng.random() < 0.7 else word] = None
    vocabulary = {piece: id for id, piece in enumerate([*pieces][:vocab_size])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)
