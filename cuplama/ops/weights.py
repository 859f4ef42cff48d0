"""What a weight holds: the one place where ops look into a weight's format.

A weight of a plain format (``f32``, ``f16``, ``bf16``) is an array of its numbers. A weight of any other format is a
value of ``cuplama/quant``: for references one that is indexed by rows and tells its numbers (``stored.py``), for
kernels blocks on a device (``packed.py``). Both name their segments, runs of rows that have one format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..dtypes import Array, upcast

__all__ = [
    "MAX_PACKED_ROWS",
    "SegmentLike",
    "expert_rows",
    "named_segments",
    "segments_of",
    "stored_bytes",
    "weight_rows",
]

MAX_PACKED_ROWS = 64
"""Rows of x that kernels multiply with a packed weight as it is. For more a library computes, from its numbers."""


class SegmentLike(Protocol):
    """Rows of a packed weight that have one format. format: of ``cuplama/quant/format.py``; data: uint8 [bytes]; order:
    i32 [k], or None."""

    @property
    def rows(self) -> int: ...
    @property
    def format(self) -> Any: ...
    @property
    def data(self) -> Array: ...
    @property
    def order(self) -> Array | None: ...


def expert_rows(rows: int) -> int:
    """Rows that an expert of so many has in a packed weight of experts: whole packed blocks of 16."""
    return -(-rows // 16) * 16


def weight_rows(w: Array, rows: Array | slice) -> Array:
    """Rows of a weight [m, k] as float32, or as float64 if they are kept so."""
    return upcast(w[rows]) if segments_of(w) is None else w[rows].numbers()


def segments_of(w: Array) -> Sequence[SegmentLike] | None:
    """The segments of a weight that is not plain, from its first row to its last; None for an array of numbers."""
    found: Sequence[SegmentLike] | None = getattr(w, "segments", None)
    return found


def named_segments(name: str, w: Array) -> Iterator[tuple[str, Array | None]]:
    """The arrays of a packed weight by the names that launches give them: ``w.0``, ``w.0.order``, ``w.1``, ..."""
    for i, segment in enumerate(segments_of(w) or ()):
        yield f"{name}.{i}", segment.data
        yield f"{name}.{i}.order", segment.order


def stored_bytes(array: Array) -> int:
    """Bytes of an array, or of a packed weight's blocks and orders."""
    segments = segments_of(array)
    if segments is None:
        return int(array.nbytes)
    return sum(int(s.data.nbytes) + (0 if s.order is None else int(s.order.nbytes)) for s in segments)
