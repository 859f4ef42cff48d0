"""Quantised weights without a checkpoint, for the workloads of the lab."""

from __future__ import annotations

import numpy as np

from ..dtypes import Array
from ..models.config import ModelConfig
from ..ops.weights import segments_of
from ..quant.catalog import CATALOG, random_stored
from ..quant.packed import Packed
from ..quant.stored import Stack, Stored, described

__all__ = ["described_weights", "filled", "random_packed"]


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


def described_weights(config: ModelConfig, weight_format: str) -> dict[str, Packed]:
    """The matrices of the layers by canonical name, described as packed in that format; nothing for ""."""
    if not weight_format:
        return {}
    return {
        name: Packed((shape[0], shape[1]), (described(shape[0], shape[1], CATALOG[weight_format]),))
        for name, shape in config.weight_shapes().items()
        if "." in name and len(shape) == 2
    }


def filled(weight: Array, rng: np.random.Generator) -> Stored | Stack:
    """Random numbers for a described weight, so small that sums over a row stay near 1."""
    m, k = weight.shape
    names = [s.format.name for s in segments_of(weight) or ()]
    return random_packed(" + ".join(names), m, k, rng, k**-0.5)
