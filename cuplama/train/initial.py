"""The first weights of a model that nothing was trained of yet.

As GPT-2 begins (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): matrices are drawn from a
normal distribution, and those whose results are added to the residual stream from a narrower one, by the root of how
many they are, so that the stream does not grow with the depth. Norms multiply by 1; other vectors, biases, are 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..models.config import ModelConfig
from ..ops.signature import dim_value
from ..quant.weight import Weight

__all__ = ["initial_weights"]

_DEVIATION = 0.02  # of a config without initializer_range
_ADDED = ("o_proj", "down_proj")  # what is added to the residual stream, twice in a layer


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Weight]:
    """Canonical name -> float32 weights, the same for the same seed, from 0 to 2^64 - 1.

    The standard deviation is the config's ``initializer_range``. Each tensor has numbers of its own, which do not
    depend on other tensors. Raises ConfigError for a deviation that is none.
    """
    deviation = config.raw.get("initializer_range", _DEVIATION)
    if type(deviation) not in (int, float) or not 0 < deviation < 1e3:
        raise ConfigError(
            f"config.json: initializer_range = {deviation!r} is not supported; supported: a number above 0"
        )
    tied, found = config.head_is_tied, dict[str, Weight]()
    for number, (name, recipe) in enumerate(config.recipes().items()):
        if name == "lm_head" and tied:
            found[name] = Weight(name, found["embed_tokens"].source, found["embed_tokens"].parts)
            continue
        numbers = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        width = deviation / math.sqrt(2 * config.num_layers) if name.endswith(_ADDED) else deviation
        dims = config.dims(name)
        shapes = [tuple(dim_value(d, dims) for d in shape.split(",")) for shape, _ in recipe.parts]
        shapes *= config.experts if recipe.experts else 1
        constant = 1 - config.family.norm_offset if name.endswith(("norm", "scalar")) else 0.0
        parts = tuple(_part(shape, constant, width, numbers) for shape in shapes)
        experts = config.experts if recipe.experts else 0
        found[name] = Weight(name, tuple(tensor for _, tensor in recipe.parts), parts, experts, recipe.wide)
    return found


def _part(shape: tuple[int, ...], constant: float, width: float, numbers: np.random.Generator) -> np.ndarray[Any, Any]:
    if len(shape) == 1:
        return np.full(shape, constant, np.float32)
    drawn = numbers.standard_normal(shape, np.float32)
    drawn *= np.float32(width)
    return drawn
