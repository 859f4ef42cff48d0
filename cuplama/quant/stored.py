"""A quantised matrix as a checkpoint stores it: a format, and where the format's numbers lie in mapped files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array
from ..ops.abstract import abstract
from ..ops.weights import expert_rows
from .fields import Field
from .format import Format

__all__ = ["ExpertStack", "Segment", "Stack", "Stored", "described", "expert_stack"]


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows of a packed weight that have one format. data: uint8 [bytes], blocks by rows and then columns; order: i32
    [k], as in ``Stored``, or None. Either is an array or the description of one."""

    rows: int
    format: Format
    data: Array
    order: Array | None = None


def described(m: int, k: int, form: Format, ordered: bool = False) -> Segment:
    """The segment that a matrix [m, k] of a packed format will be."""
    assert form.packing is not None
    data = abstract((form.packing.nbytes(m, k),), np.dtype(np.uint8))
    return Segment(m, form, data, abstract((k,), DTYPES["i32"]) if ordered else None)


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix [m, k], array-like: it has a shape and is indexed by rows.

    fields: the code of each element (``code``), and of each row and group the format's parts (``scale``, ``zero``,
    ...); order: int32 [k], where the columns are not in their own order: column j here is column order[j] of the
    weight; nbytes: bytes in the files.
    """

    shape: tuple[int, int]
    format: Format
    fields: Mapping[str, Field]
    nbytes: int
    order: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Array | slice) -> Stored:
        """Some rows, in that order: a view of the same files."""
        count = len(range(self.shape[0])[rows]) if isinstance(rows, slice) else len(rows)
        fields = {name: field.take_rows(rows) for name, field in self.fields.items()}
        nbytes = self.nbytes * count // max(1, self.shape[0])
        return replace(self, shape=(count, self.shape[1]), fields=fields, nbytes=nbytes)

    def numbers(self) -> np.ndarray[Any, Any]:
        """What it holds, float32 [m, k]."""
        found: np.ndarray[Any, Any] = self.format.decode(self)
        return found

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What it is when it is packed, described."""
        return (described(*self.shape, self.format, self.order is not None),)


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices of one width, one below the other: array-like as ``Stored``."""

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of all parts, columns)."""
        return sum(len(p) for p in self.parts), self.parts[0].shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Array | slice) -> Stack | Stored:
        """Some rows, in that order."""
        wanted = np.arange(len(self))[rows]
        ends = list(itertools.accumulate(len(p) for p in self.parts))
        part = np.searchsorted(ends, wanted, "right")
        cuts = np.flatnonzero(np.diff(part)) + 1
        found = [
            self.parts[p[0]][r - (ends[p[0]] - len(self.parts[p[0]]))]
            for p, r in zip(np.split(part, cuts), np.split(wanted, cuts), strict=True)
            if len(p)
        ]
        return Stack(tuple(found)) if found else self.parts[0][:0]

    def numbers(self) -> np.ndarray[Any, Any]:
        """What it holds, float32 [m, k]."""
        return np.concatenate([p.numbers() for p in self.parts])

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What it is when it is packed, described."""
        return tuple(s for p in self.parts for s in p.segments)


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """Matrices of one shape, one for each expert: array-like [E, m, k], indexed by expert."""

    parts: tuple[Stored | Stack, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, rows of each, columns)."""
        return len(self.parts), *self.parts[0].shape

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, expert: int) -> Stored | Stack:
        return self.parts[expert]

    def numbers(self) -> np.ndarray[Any, Any]:
        """What it holds, float32 [E, m, k]."""
        return np.stack([p.numbers() for p in self.parts])

    @property
    def matrices(self) -> tuple[Stored, ...]:
        """Its matrices one below the other as they are packed: the last row of an expert is repeated where its rows
        are no whole number of packed blocks. Nobody reads what that gives."""
        found: list[Stored] = []
        for expert in self.parts:
            *first, last = expert.parts if isinstance(expert, Stack) else (expert,)
            more = expert_rows(len(expert)) - len(expert)
            found += [*first, last[np.minimum(np.arange(len(last) + more), len(last) - 1)] if more else last]
        return tuple(found)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What it is when it is packed, described."""
        E, m, k = self.shape
        return (described(E * expert_rows(m), k, self.matrices[0].format),)


def expert_stack(parts: Sequence[Stored], experts: int) -> ExpertStack:
    """The parts of several experts, as many of each, expert after expert."""
    each = len(parts) // experts
    runs = [tuple(parts[at : at + each]) for at in range(0, len(parts), each)]
    return ExpertStack(tuple(run[0] if each == 1 else Stack(run) for run in runs))
