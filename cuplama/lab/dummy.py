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
from ..loading import DTYPE_NAMES, context_length, load, start_engine
from ..model import Model
from ..models.config import ModelConfig
from ..models.presets import find_shape, is_shape
from ..quant.weight import Weight
from .quantised import layer_formats, layer_matrices
from .random_weights import random_quantised, random_weight

__all__ = ["Source", "dummy_model", "dummy_weights"]


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

    def open(self, context: int, cache_tokens: int) -> Model:
        """Load the model, or make it up. context, cache_tokens: as of ``load``.

        Raises ParameterError for random weights of no model, ConfigError for a known shape without --dummy-weights.
        """
        if self.dummy:
            if self.model is None:
                raise ParameterError("--dummy-weights needs -m: a folder with a config.json, or a known shape")
            return dummy_model(
                self.model,
                self.device,
                self.dtype,
                context,
                cache_tokens,
                self.weight_format,
                kv_cache_dtype=self.kv_cache_dtype,
                activations=self.activations,
                deterministic=self.deterministic,
            )
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
        )


def dummy_weights(config: ModelConfig, dtype: np.dtype[Any], form: str = "") -> dict[str, Weight]:
    """Random weights by canonical name, as a checkpoint would give them. Scales of norms are near 1, the rest near 0.

    form: of ``WEIGHT_FORMATS`` for the matrices of the layers, or "". The head shares the embedding's array if the
    config ties them.
    """
    found = {
        name: random_weight(
            name,
            shape,
            dtype,
            ("embed_tokens",) if name == "lm_head" and config.tied else (name,),
            float(name.endswith("norm")),
        )
        for name, shape in config.weight_shapes().items()
    }
    for name, (_, k) in layer_matrices(config) if form else ():
        found[name] = random_quantised(name, k, layer_formats(config, name, form))
    return found


def dummy_model(
    model: str, device: str, dtype: str, context: int, cache_tokens: int, form: str = "", **more: Any
) -> Model:
    """A model of that shape with random weights and without a tokenizer. dtype "auto": what the config states.

    form: of the layers' matrices; more: other fields of a ``Setup``.
    """
    name, config = find_shape(model)
    weights = dummy_weights(config, DTYPES[config.stored], form)
    length = context_length(config, context)
    setup = Setup(device, DTYPE_NAMES[dtype], length, max(length, cache_tokens), **more)
    engine = start_engine(config, weights, setup)
    return Model(Path(name), config, None, engine, Settings.read(Path(name), config, None))
