"""A tensor of a checkpoint's file, as it is stored or as a reader of quantised layouts understood it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import DTYPES
from .stored import Stored

__all__ = ["SAFETENSORS", "Tensor"]

# The dtypes of safetensors that NumPy can view; 8-bit floats as their bytes.
SAFETENSORS: Mapping[str, np.dtype[Any]] = {
    **{name: DTYPES[name.lower()] for name in ("F64", "F32", "F16", "BF16", "I64", "U64", "I32", "U32")},
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I8": np.dtype(np.int8),
    **{name: np.dtype(np.uint8) for name in ("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")},
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a file.

    name: in the file, of a quantised matrix that of its codes; dtype: as safetensors calls it, or the name of a format;
    shape: of a quantised matrix that of the numbers, [out, in]; data: a read-only view of the mapped file, a ``Stored``
    matrix, or None if NumPy has no such dtype.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any] | Stored | None
