"""What a weight holds, as numbers: the one place where references look into a weight's format.

A weight of a plain format (``f32``, ``f16``, ``bf16``) is an array of its numbers. A weight of any other format is an
array-like value, indexed by rows, that names its format (``cuplama/quant/format.py``) in an attribute ``format``.
"""

from __future__ import annotations

from ..dtypes import Array, upcast

__all__ = ["weight_rows"]


def weight_rows(w: Array, rows: Array | slice) -> Array:
    """Rows of a weight [m, k] as float32, or as float64 if they are kept so."""
    form = getattr(w, "format", None)
    return upcast(w[rows]) if form is None else form.decode(w[rows])
