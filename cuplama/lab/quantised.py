"""Quantised weights without a checkpoint, for the workloads of the lab."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..dtypes import Array
from ..models.config import ModelConfig
from ..models.rounding import linear_weights
from ..ops.signature import dim_value
from ..ops.weights import expert_rows, segments_of
from ..quant.catalog import CATALOG, random_stored
from ..quant.format import Format
from ..quant.packed import Packed
from ..quant.stored import ExpertStack, Stack, Stored, described

__all__ = [
    "WEIGHT_FORMATS",
    "described_weights",
    "filled",
    "layer_formats",
    "layer_matrices",
    "random_packed",
    "random_weight",
]


def random_packed(formats: str, m: int, k: int, rng: np.random.Generator, deviation: float = 1.0) -> Stored | Stack:
    """A random quantised weight: "int4 g128"; "Q4_K ordered", with columns in an order of their own; or of several
    formats, "Q4_K + Q6_K", each for an equal share of the rows."""
    names = formats.split(" + ")
    ends = [m * (i + 1) // len(names) for i in range(len(names))]
    parts = tuple(
        random_stored(CATALOG[name.removesuffix(" ordered")], end - start, k, rng, name.endswith(" ordered"), deviation)
        for name, start, end in zip(names, [0, *ends], ends, strict=False)
    )
    return parts[0] if len(parts) == 1 else Stack(parts)


def random_weight(
    formats: str, shape: Sequence[int], rng: np.random.Generator, deviation: float = 1.0
) -> Stored | Stack | ExpertStack:
    """The same by its shape, [m, k] or, for each of E experts, [E, m, k]."""
    *experts, m, k = shape
    parts = [random_packed(formats, m, k, rng, deviation) for _ in range(*experts or [1])]
    return ExpertStack(tuple(parts)) if experts else parts[0]


MIXTURES: Mapping[str, tuple[str, str]] = {"Q4_K_M": ("Q4_K", "Q6_K"), "Q5_K_M": ("Q5_K", "Q6_K")}
"""What llama.cpp makes of a model under such a name: the format of most matrices, and that of the values of attention
and of the products behind the activation in half of the layers. Embedding and head are quantised there, too; here they
stay plain."""

_EXPERTS = " experts"  # behind a format that the matrices of experts alone have
WEIGHT_FORMATS = (*CATALOG, *MIXTURES, "mxfp4" + _EXPERTS)
"""The names of formats that the matrices of random layers may have; the last as gpt-oss is published."""


def layer_formats(config: ModelConfig, name: str, weight_format: str) -> list[tuple[int, Format]]:
    """(rows, format) of each run of equal rows of a layer's matrix, or of that of an expert. weight_format: one of
    ``WEIGHT_FORMATS``."""
    weight_format = weight_format.removesuffix(_EXPERTS)
    base, wide = MIXTURES.get(weight_format, (weight_format, weight_format))
    layer, layers, dims = int(name.split(".")[0]), config.num_layers, config.dims(name)
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    found: list[tuple[int, Format]] = []
    for shape, tensor in config.recipes()[name].parts:
        rows, module = dim_value(shape.split(",")[0], dims), tensor.split(".")[-2]
        form = CATALOG[wide if more and module in ("v_proj", "down_proj") else base]
        if found and found[-1][1] == form:
            rows += found.pop()[0]
        found.append((rows, form))
    return found


def described_weights(config: ModelConfig, weight_format: str) -> dict[str, Packed]:
    """The matrices of the layers by canonical name, described as packed in that format; nothing for ""."""
    found = {}
    for name, shape in layer_matrices(config, weight_format):
        formats, k = layer_formats(config, name, weight_format), shape[-1]
        if len(shape) == 3:
            formats = [(shape[0] * expert_rows(shape[1]), formats[0][1])]
        found[name] = Packed(shape, tuple(described(rows, k, form) for rows, form in formats))
    return found


def layer_matrices(config: ModelConfig, weight_format: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical name and shape of every matrix of the layers that has the format, those of experts [E, m, k]."""
    shapes = config.weight_shapes()
    for name in linear_weights(config) if weight_format else ():
        if len(shapes[name]) == 3 or not weight_format.endswith(_EXPERTS):
            yield name, shapes[name]


def filled(weight: Array, rng: np.random.Generator) -> Stored | Stack | ExpertStack:
    """Random numbers for a described weight, so small that sums over a row stay near 1."""
    names = [s.format.name for s in segments_of(weight) or ()]
    return random_weight(" + ".join(names), weight.shape, rng, weight.shape[-1] ** -0.5)
