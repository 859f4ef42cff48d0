"""Scales and zero points by groups of columns, of any size, as the blocks of packed weights have them.

Blocks know groups of 16, 32, 64 and 128 columns, and scales of whole rows. A larger group is several of those with the
same scale: its column of the field is repeated in the field's table, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..dtypes import dtype_name
from .fields import Field, element_plane
from .format import Code, grouped
from .settings import Settings
from .stored import Stored

__all__ = ["by_block", "by_element", "by_groups", "by_row", "group_size", "sorted_columns"]

_GROUPS = (128, 64, 32, 16)


def group_size(settings: Settings, *keys: str) -> int:
    """The size of groups that a field asks for, -1 for whole rows. Raises ConfigError for one that blocks have not."""
    group = settings.size(*keys)
    if group != -1 and group % _GROUPS[-1]:
        settings.refuse(settings.key(*keys), f"-1 or a multiple of {_GROUPS[-1]}")
    return group


def by_element(array: np.ndarray[Any, Any], transposed: bool = False) -> Field:
    """A number for each row and group: the elements of a contiguous 2-D array."""
    return Field((element_plane(array, transposed),))


def by_row(array: np.ndarray[Any, Any], m: int) -> Field:
    """A number for each of m rows, from one for each or one for all: [m], [m, 1], [1], [] or [1, 1]."""
    plane = element_plane(np.ascontiguousarray(array).reshape(-1, 1))
    return Field((replace(plane, rows=np.resize(plane.rows, m)),))


def by_block(array: np.ndarray[Any, Any], m: int, height: int) -> Field:
    """A number for each of m rows and group, from one for each block of so many rows: [ceil(m / height), groups]."""
    return by_element(array).take_rows(np.arange(m) // height)


def by_groups(
    name: str,
    code: Code,
    codes: Field,
    scale: Field,
    dtype: np.dtype[Any],
    group: int,
    *,
    zero: Field | None = None,
    order: np.ndarray[Any, Any] | None = None,
    nbytes: int,
) -> Stored:
    """A quantised matrix.

    name: of the codes, as people read it; scale: one for each row and group, floats of ``dtype``; group: columns, a
    multiple of 16, or 0 for whole rows; zero: as the scales; nbytes: in the files.
    """
    m, k = codes.shape
    label = name + (f" g{group}" if group else "") + ("" if zero is None else " zero")
    if not group and zero is None:
        form = grouped(label, code, 0)
        return Stored((m, k), form, {"code": codes, "scale": _as_float32(scale, dtype)}, nbytes, order)
    known = next(g for g in _GROUPS if group % g == 0)  # whole rows: 0 % 128
    columns = np.arange(-(-k // known)) * known // (group or k)
    form = grouped(label, code, known, dtype_name(dtype), zero=zero is not None)
    fields = {"code": codes, "scale": scale.take_columns(columns)}
    if zero is not None:
        fields["zero"] = zero.take_columns(columns)
    return Stored((m, k), form, fields, nbytes, order)


def _as_float32(field: Field, dtype: np.dtype[Any]) -> Field:
    """A field of floats of any dtype as one of float32."""
    if dtype == np.float32:
        return field
    bits = field.read().astype(np.dtype(f"u{dtype.itemsize}"))
    return by_element(np.ascontiguousarray(bits.view(dtype).astype(np.float32)))


def sorted_columns(g_idx: np.ndarray[Any, Any], group: int) -> tuple[bool, np.ndarray[Any, Any] | None]:
    """Columns in the order of their groups, from the group of each: (whether all groups have ``group`` columns, order).

    The order, int32 [k], is None where the columns lie in it already. Columns of one group keep theirs.
    """
    k = len(g_idx)
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    even = bool(np.array_equal(g_idx[order], np.arange(k) // group))
    return even, None if np.array_equal(order, np.arange(k)) else order
