"""Tensors made by hand, as a checkpoint's file would hold them, and what a reader makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.errors import CuplamaError
from cuplama.quant.readers import check, read_quantised
from cuplama.quant.stored import Stored
from cuplama.quant.tensor import Tensor

__all__ = ["BF16", "E4M3", "Arrays", "codes_along", "left", "numbers", "refusal", "stored", "tensors"]

Arrays = Mapping[str, np.ndarray[Any, Any]]
Settings = Mapping[str, Any]
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_EIGHT = ("float8_e4m3fn", "float8_e8m0fnu")


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """The tensors of a file, by name; 8-bit floats are seen as bytes."""
    found = {}
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).reshape(array.shape)
        kind = data.dtype.name
        found[name] = Tensor(name, Path("F"), _NAMES[kind], data.shape, data.view(np.uint8) if kind in _EIGHT else data)
    return found


def left(settings: Settings, arrays: Arrays) -> Mapping[str, Tensor]:
    """What a reader leaves of the tensors, after the settings were checked as config.json's are."""
    check(settings, "config.json")
    return read_quantised(tensors(arrays), settings, "config.json")


def stored(settings: Settings, arrays: Arrays, name: str = "x") -> Stored:
    """The quantised weight of a module."""
    data = left(settings, arrays)[f"{name}.weight"].data
    assert isinstance(data, Stored)
    return data


def numbers(settings: Settings, arrays: Arrays, name: str = "x") -> np.ndarray[Any, Any]:
    """The weight's numbers, float32 [out, in]."""
    return stored(settings, arrays, name).numbers()


def refusal(settings: Settings, arrays: Arrays) -> str:
    """The one line with which tensors are refused."""
    with pytest.raises(CuplamaError) as e:
        left(settings, arrays)
    assert "\n" not in str(e.value)
    return f"{e.type.__name__}: {e.value}"


def codes_along(codes: np.ndarray[Any, Any], bits: int, axis: int) -> np.ndarray[Any, Any]:
    """Codes packed into 32-bit words along an axis, one after the other, low bits first; the last word is filled up."""
    each = 32 // bits
    lines = np.moveaxis(codes.astype(np.uint64), axis, 0)
    count = -(-len(lines) // each) * each
    padded = np.zeros((count, *lines.shape[1:]), np.uint64)
    padded[: len(lines)] = lines
    words = np.zeros((count // each, *lines.shape[1:]), np.uint64)
    for place in range(each):
        words |= padded[place::each] << np.uint64(bits * place)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis))
