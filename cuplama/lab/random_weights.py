"""Weights without a checkpoint: random values, made as a backend asks for them. Zeros could be faster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np

from ..dtypes import DTYPES, dtype_name
from ..quant.catalog import random_stored
from ..quant.fields import Field, Plane
from ..quant.format import Format, plain_format
from ..quant.stored import Stored
from ..quant.weight import Weight

__all__ = ["random_quantised", "random_weight"]

_PERIOD = (1 << 23) + 331  # values that are made once and repeated; odd, so that no two rows of a weight are equal


@cache
def _values(dtype: str, centre: float) -> np.ndarray[Any, Any]:
    """Normal values of deviation 0.02 around ``centre``."""
    values = np.random.default_rng(0).standard_normal(_PERIOD, np.float32)
    values *= 0.02
    values += np.float32(centre)
    return values.astype(DTYPES[dtype])


@dataclass(frozen=True)
class _RandomWeight:
    """Has the interface of ``quant.weight.Weight`` and holds random values: the same values over and over.

    source, wide: as of a Weight; two weights with the same source are one. centre: the mean, 1 for the scale of a norm.
    """

    name: str
    shape: tuple[int, ...]
    source: tuple[str, ...]
    dtype: np.dtype[Any]
    centre: float = 0.0
    wide: bool = False

    packed = False
    parts = ()

    @property
    def formats(self) -> tuple[Format, ...]:
        """The plain format of its elements."""
        return (plain_format(self.dtype),)

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, if all of it were there."""
        return self.device_bytes(self.dtype)

    def device_bytes(self, dtype: np.dtype[Any]) -> int:
        """Bytes on a device where plain weights have that dtype."""
        return self.elements * self.device_dtype(dtype).itemsize

    def device_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """As of a Weight."""
        return DTYPES["f32"] if self.wide else dtype

    def mapped(self) -> np.ndarray[Any, Any]:
        """As of a Weight."""
        return self.array()

    def chunks(self, max_bytes: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Yields (element offset, contiguous 1-D array) for chunks of at most ``max_bytes``."""
        values, size = _values(dtype_name(self.dtype), self.centre), math.prod(self.shape)
        length = max(1, min(len(values), max_bytes // self.dtype.itemsize))
        for at in range(0, size, length):
            yield at, values[: min(length, size - at)]

    def array(self) -> np.ndarray[Any, Any]:
        """The whole weight."""
        flat = np.empty(math.prod(self.shape), self.dtype)
        for at, chunk in self.chunks(1 << 30):
            flat[at : at + chunk.size] = chunk
        return flat.reshape(self.shape)


def random_weight(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    source: tuple[str, ...] = (),
    centre: float = 0.0,
    wide: bool = False,
) -> Weight:
    """A weight of random values, as backends take it: normal, of deviation 0.02. source: its name if not given."""
    return cast(Weight, _RandomWeight(name, shape, source or (name,), dtype, centre, wide))


_ROWS = 512  # of a quantised weight that are made once and repeated


def random_quantised(name: str, k: int, formats: Sequence[tuple[int, Format]], experts: int = 0) -> Weight:
    """A quantised weight of random values of deviation 0.02: in each part the same rows over and over.

    k: columns; formats: (rows, format) of each part; experts: how many have these parts each, all alike.
    """
    parts = []
    for m, form in formats:
        few = random_stored(form, min(m, _ROWS), k, np.random.default_rng(0), deviation=0.02)
        fields = {part: _repeated(field, m) for part, field in few.fields.items()}
        parts.append(Stored((m, k), form, fields, few.nbytes * m // few.shape[0]))
    return Weight(name, tuple(f"{name}.{i}" for i in range(len(parts))), tuple(parts) * max(1, experts), experts)


def _repeated(field: Field, m: int) -> Field:
    def planes(plane: Plane) -> Plane:
        return replace(plane, rows=np.resize(plane.rows, m))

    return replace(field, planes=tuple(map(planes, field.planes)))
