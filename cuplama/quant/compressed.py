"""What compressed-tensors stores of a quantised matrix, and how its config describes it.

The library (https://github.com/vllm-project/compressed-tensors) is read by transformers and vLLM. Whole numbers are
"pack-quantized": ``weight_packed`` int32 [m, ceil(k bits / 32)], low bits first along a row, numbers with half of their
range added; 8-bit floats "float-quantized": ``weight`` e4m3 [m, k]. ``weight_scale`` [m, groups] is in the checkpoint's
dtype. Activations are not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .format import E4M3
from .grid import Grid
from .rtn import Quantised, packed_words, unpacked_words

__all__ = ["TensorSpec", "config_of", "read_tensors", "tensor_specs", "tensors_of"]

_VERSION = "0.20.0"  # of the library whose fields these are


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be stored: dtype as safetensors names it, and shape."""

    dtype: str
    shape: tuple[int, ...]


def tensor_specs(grid: Grid, group: int, m: int, k: int, scales: str) -> dict[str, TensorSpec]:
    """What is stored of a matrix [m, k], by the end of the name: "weight_packed", ...

    scales: their dtype as safetensors names it.
    """
    found = {"weight_scale": TensorSpec(scales, (m, k // (group or k)))}
    if grid.code is E4M3:
        return {"weight": TensorSpec("F8_E4M3", (m, k)), **found}
    packed = TensorSpec("I32", (m, -(-k * grid.code.bits // 32)))
    return {"weight_packed": packed, **found, "weight_shape": TensorSpec("I64", (2,))}


def tensors_of(q: Quantised) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a matrix, by the end of the name."""
    scales = {"weight_scale": q.scales.astype(q.dtype)}
    if q.grid.code is E4M3:
        return {"weight": q.codes, **scales}
    shape = np.array(q.codes.shape, np.int64)
    return {"weight_packed": packed_words(q.codes, q.grid.code.bits), **scales, "weight_shape": shape}


def read_tensors(tensors: Mapping[str, np.ndarray[Any, Any]], grid: Grid, group: int, k: int) -> Quantised:
    """The matrix [m, k] of the tensors that ``tensors_of`` gave, or of their bytes in the same shapes."""
    scales = tensors["weight_scale"]
    if grid.code is E4M3:
        codes = tensors["weight"].view(np.uint8)
    else:
        codes = unpacked_words(tensors["weight_packed"], grid.code.bits, k)
    return Quantised(grid, group, scales.dtype, codes, scales.astype(np.float32))


def config_of(grid: Grid, group: int, ignore: Sequence[str], sort: bool) -> dict[str, Any]:
    """The field "quantization_config" of config.json. ignore: names of linear layers that stay as
    they are; sort: whether columns were quantised in another order than theirs, which readers need not know."""
    layout = "float-quantized" if grid.code is E4M3 else "pack-quantized"
    weights: dict[str, Any] = {
        "actorder": "weight" if sort else None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group or None,
        "num_bits": grid.code.bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group" if group else "channel",
        "symmetric": True,
        "type": "float" if grid.code is E4M3 else "int",
    }
    groups = {
        "format": layout,
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": groups},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": [*ignore],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
    }
