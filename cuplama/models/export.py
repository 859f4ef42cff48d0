"""Canonical weights as the tensors of a checkpoint: the way back from what ``checkpoint.py`` stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..ops.signature import dim_value
from .config import ModelConfig

__all__ = ["checkpoint_tensors"]


def checkpoint_tensors(
    config: ModelConfig, arrays: Mapping[str, np.ndarray[Any, Any]]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(tensor name, array) of every tensor that some canonical arrays are stacked of, in the shapes of the checkpoint.

    arrays: canonical name -> weight, or whatever has its shape, such as its gradient. A head that is tied to the
    embedding is not in it, as in checkpoints.
    """
    for name, recipe in config.recipes().items():
        if name not in arrays:
            continue
        at, dims = 0, config.dims(name)
        for shape, tensor in recipe.parts:
            rows = slice(at, at := at + dim_value(shape.split(",")[0], dims))
            if recipe.experts:
                parts = [recipe.stored(array[rows], dims) for array in arrays[name]]
                yield from (
                    ((tensor.replace("{e}", str(e)), part) for e, part in enumerate(parts))
                    if "{e}" in tensor
                    else [(tensor, np.stack(parts))]
                )
            elif config.adapter is None or config.adapter.stores(tensor):
                yield tensor, recipe.stored(arrays[name][rows], dims)
