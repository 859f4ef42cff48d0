"""A quantised matrix as a checkpoint stores it: a format, and where the format's numbers lie in mapped files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..dtypes import Array
from .fields import Field
from .format import Format

__all__ = ["Stored"]


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix [m, k], array-like: it has a shape and is indexed by rows.

    fields: the code of each element (``code``), and of each row and group the format's parts (``scale``, ``zero``, ...);
    order: int32 [k], where the columns are not in their own order: column j here is column order[j] of the weight;
    nbytes: bytes in the files.
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
