"""Backends: where arrays live and how nodes run. The engine knows only this interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..dtypes import Array
from ..ops.node import Node
from ..ops.op import Op
from ..quant.weight import Weight

__all__ = ["Backend", "CapturedGraph", "Event", "Fetch"]


class Event(Protocol):
    """A point in the device's queue."""

    def synchronize(self) -> None:
        """Wait until the device has passed it."""


class Fetch(Protocol):
    """Copies of arrays that are on their way to the host."""

    def wait(self) -> list[np.ndarray[Any, Any]]:
        """The copies, once they are there."""


class CapturedGraph(Protocol):
    """The launches of a body of calls, which can be repeated. The first replays may run the body call by call."""

    def replay(self) -> Event:
        """Queue the body once; the event is behind it."""

    def close(self) -> None:
        """Forget the body and what was captured of it."""


class Backend(Protocol):
    """Where arrays live and how ops run on them.

    name: ``numpy`` or ``cuda``; dtype: the T of op signatures; activations: "fp8" where products of many rows with fp8
    weights round the other side to fp8 as well, else "auto"; prefill_chunk: tokens of a prefill pass at most; captures:
    whether prompts and decode steps go through ``capture``; forks: whether a child process that is forked can use it;
    deterministic: whether what is computed for a row is the same, bit for bit, however many other rows there are.
    """

    name: str
    dtype: np.dtype[Any]
    activations: str
    prefill_chunk: int
    captures: bool
    forks: bool
    deterministic: bool

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on compiling kernels so far."""

    def describe(self) -> str:
        """One line for people: what the model runs on."""

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        """A device array with the same content."""

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        """The content as a NumPy array, once everything queued before has run."""

    def fetch(self, arrays: Sequence[Array]) -> Fetch:
        """Copy arrays to the host, in order with what is queued: what is queued later may overwrite them."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A device array of zeros."""

    def transpose(self, array: Array) -> Array:
        """The transpose of a matrix, contiguous."""

    def load_weight(self, weight: Weight) -> Array:
        """A checkpoint weight in the backend's dtype."""

    def end_loading(self) -> None:
        """Give back what only loading weights needs."""

    def call(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> tuple[Array, ...]:
        """Run one op. In-place outputs are returned as well."""

    def run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        """Run a node list on named values and return the ones in ``keep``; the rest is freed as soon as it is dead."""

    def capture(self, body: Callable[[], None], sharing: Any = None) -> CapturedGraph:
        """Capture the launches of ``body``, so that a replay repeats them without the body's work on the host.

        sharing: a captured graph whose memory this one uses as well. Of neither anything may be kept that it allocates:
        a replay of the one overwrites what the other has left.
        """

    def host_ring(self, shape: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Array]:
        """An int32 array in host memory that the device can write: as the host sees it, and as ops take it."""

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Overwrite a device array, in order with what is queued."""

    def copy(self, array: Array, source: Array) -> None:
        """Overwrite a contiguous device array with another of its shape and dtype, in order with what is queued."""

    def when_short_of_memory(self, give_back: Callable[[], None]) -> None:
        """Call ``give_back``, which drops what is kept only for speed, before an allocation fails."""

    def close(self) -> None:
        """Give back everything."""
