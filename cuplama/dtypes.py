"""The dtypes of arrays by the short names that signatures and kernels use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "E4M3_MAX", "Array", "dtype_name", "narrow", "upcast"]

Array = Any  # a NumPy or CuPy array: both have shape, dtype, flags and nbytes
DTYPES: Mapping[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),  # 4 bits of exponent, 3 of mantissa; no infinities
    "i64": np.dtype(np.int64),
    "u64": np.dtype(np.uint64),
    "i32": np.dtype(np.int32),
    "u32": np.dtype(np.uint32),
}
E4M3_MAX = 448.0
"""The largest number of e4m3."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The short name of a dtype, as signatures and kernels spell it: ``bf16``, ``i32``, ..."""
    return _NAMES[np.dtype(dtype)]


def upcast(x: Array) -> Array:
    """The array in the precision that references compute in: float32, or float64 if it is float64 already."""
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def narrow(x: Array, dtype: np.dtype[Any]) -> Array:
    """The array rounded to another float dtype: to the nearest number, of two to the even one. What e4m3 cannot hold
    becomes its largest, 448 with the sign; NaN stays NaN. So does the GPU, from float32: cvt.rn.satfinite."""
    return (np.clip(x, -E4M3_MAX, E4M3_MAX) if dtype == DTYPES["e4m3"] else x).astype(dtype, copy=False)
