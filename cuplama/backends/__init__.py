"""Backends: where arrays live and how nodes run. The engine knows only this interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..checkpoint import Weight
from ..graph import Node
from ..op import Array

__all__ = ["Backend"]


class Backend(Protocol):
    """name: ``numpy`` or ``cuda``; dtype: the T of op signatures; prefill_chunk: tokens of a prefill pass at most."""

    name: str
    dtype: np.dtype[Any]
    prefill_chunk: int

    def describe(self) -> str:
        """One line for people: what the model runs on."""

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        """A device array with the same content."""

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        """The content as a NumPy array, once everything queued before has run."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A device array of zeros."""

    def load_weight(self, weight: Weight) -> Array:
        """A checkpoint weight in the backend's dtype."""

    def call(self, op: str, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> tuple[Array, ...]:
        """Run one op. In-place outputs are returned as well."""

    def run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        """Run a node list on named values and return the ones in ``keep``; the rest is freed as soon as it is dead."""

    def close(self) -> None:
        """Give back everything."""
