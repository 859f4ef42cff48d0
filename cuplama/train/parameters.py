"""The weights that are trained, with what the optimizer keeps of each, in five flat arrays.

All weights lie one behind the other, so AdamW is a few launches for any number of tensors; what a node reads or adds to
is a view. They lie in groups, since not all are updated alike (``GROUPS``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array

__all__ = ["GROUPS", "STATE", "Parameters"]

GROUPS = ("orthogonal", "matrices", "vectors")
"""The groups of weights, in their order: matrices that Muon updates, none where it does not run; other tensors of two
or more dimensions, which decay as well; the rest."""
STATE = ("master", "m", "v")
"""What a checkpoint of the training holds: float32 weights, and the means of gradients and of their squares. Muon has
no use for the latter: in its group m is the momentum, and v stays 0."""
# Every weight begins at a multiple of so many elements: 128 bytes in 16 bits, as products like it. Rows of logits that
# are a multiple are what makes products of a vocabulary of 50,257 fast: on an H200, GPT-2's took 32 of 60 ms without.
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Place:
    """Where a weight lies. rows: that it has there; those beyond its own are 0."""

    start: int
    shape: tuple[int, ...]
    rows: int

    @property
    def size(self) -> int:
        return self.rows * math.prod(self.shape[1:])

    def of(self, flat: Array) -> Array:
        """The weight with the rows behind it."""
        return flat[self.start : self.start + self.size].reshape(self.rows, *self.shape[1:])


class Parameters:
    """Trained weights on a backend.

    weights, gradients: name -> array, views of p and g for nodes; p [n] T, and g, m, v, master [n] float32: the flat
    arrays. In a float32 model p and master are one. parts: name of a group -> where it lies in a flat array, which may
    be nowhere. The rest of a flat array, between weights, is 0 and stays so.
    """

    def __init__(
        self,
        backend: Backend,
        weights: Mapping[str, np.ndarray[Any, Any]],
        rounded: Collection[str] = (),
        orthogonal: Collection[str] = (),
    ) -> None:
        """weights: name -> first values; rounded: matrices whose rows nodes see rounded up to a multiple of 64, with
        rows of 0; orthogonal: those of the group of that name. Raises DeviceError where memory is short."""
        self._backend = backend
        shapes = {name: array.shape for name, array in weights.items()}
        self._places, ends = _lay_out(shapes, rounded, orthogonal)
        self.parts = {name: slice(*cut) for name, cut in zip(GROUPS, pairwise((0, *ends)), strict=True)}
        size = ends[-1]
        f32 = DTYPES["f32"]
        self.g, self.m, self.v, self.master = (backend.zeros((size,), f32) for _ in range(4))
        self.p = self.master if backend.dtype == f32 else backend.zeros((size,), backend.dtype)
        self.weights, self.gradients = (
            {name: place.of(flat) for name, place in self._places.items()} for flat in (self.p, self.g)
        )
        masters, rounded_ones = self.views(self.master), self.views(self.p)
        for name, array in weights.items():
            backend.write(masters[name], np.ascontiguousarray(array, f32))
            if self.p is not self.master:
                backend.write(rounded_ones[name], np.ascontiguousarray(array).astype(backend.dtype))

    def views(self, flat: Array) -> dict[str, Array]:
        """The weights' parts of a flat array, by name and in their shapes."""
        return {name: place.of(flat)[: place.shape[0]] for name, place in self._places.items()}

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of the arrays of ``STATE`` on the host, float32, in one row each."""
        return {name: self._on_host(getattr(self, name)) for name in STATE}

    def weights_on_host(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of the weights on the host, by name and in their own shapes."""
        return {name: self._on_host(array) for name, array in self.views(self.p).items()}

    def _on_host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy, which the next steps do not change. What is on the host anyway is downloaded as it is."""
        found = self._backend.download(array)
        return found.copy() if found is array else found

    def load_state(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from what ``state`` gave. Raises ValueError for arrays of another size."""
        for name in STATE:
            array = getattr(self, name)
            if state[name].shape != array.shape:
                raise ValueError(f"{name} has {state[name].size} elements, not {array.size}")
            self._backend.write(array, state[name])
        if self.p is not self.master:
            self._backend.write(self.p, state["master"].astype(self._backend.dtype))


def _lay_out(
    shapes: Mapping[str, tuple[int, ...]], rounded: Collection[str], orthogonal: Collection[str]
) -> tuple[dict[str, _Place], list[int]]:
    """(where each weight lies, where each group ends)."""
    places: dict[str, _Place] = {}
    end, ends = 0, []
    for group in GROUPS:
        for name, shape in shapes.items():
            if group == ("orthogonal" if name in orthogonal else "matrices" if len(shape) >= 2 else "vectors"):
                place = places[name] = _Place(end, shape, _up(shape[0]) if name in rounded else shape[0])
                end += _up(place.size)
        ends.append(end)
    return places, ends


def _up(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
