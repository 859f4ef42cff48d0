"""A weight's format: how its bits become numbers.

A format is a value of the weight, not of the graph: a node list is the same whatever the weights are stored in. The
plain formats, one number an element, are here. Every other format is a file of its own in this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, upcast

__all__ = ["PLAIN", "Format", "plain_format"]


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    name: as signatures and kernels spell it; dtype: of the stored elements; decode: stored rows [m, ...] to their
    numbers [m, k], in float32.
    """

    name: str
    dtype: np.dtype[Any]
    decode: Callable[[Array], Array]


def _decode_bf16(bits: Array) -> Array:
    """A bf16 is the upper half of a float32: to shift is much faster than to cast."""
    if not isinstance(bits, np.ndarray):
        return upcast(bits)
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


PLAIN: Mapping[str, Format] = {
    "f32": Format("f32", DTYPES["f32"], upcast),
    "f16": Format("f16", DTYPES["f16"], upcast),
    "bf16": Format("bf16", DTYPES["bf16"], _decode_bf16),
}
"""One number an element, by name."""


def plain_format(dtype: np.dtype[Any]) -> Format:
    """The plain format whose elements have that dtype. Raises ValueError if there is none."""
    for form in PLAIN.values():
        if form.dtype == dtype:
            return form
    raise ValueError(f"no plain weight format stores {np.dtype(dtype)}")
