"""What is queued on a GPU: points in the stream, copies on their way to the host, and captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import DeviceError
from ...ops.node import Node
from .gpu import Gpu

__all__ = ["CapturedGraph", "Event", "Fetch", "failure"]


class _Owner(Protocol):
    """What a captured graph asks of its backend; see ``CudaBackend``."""

    gpu: Gpu
    checking: bool
    replay_hook: Callable[[], AbstractContextManager[Any]]


class Event:
    """A point in the stream."""

    def __init__(self, event: Any, failures: tuple[type[Exception], ...]) -> None:
        self._event, self._failures = event, failures

    def synchronize(self) -> None:
        """Wait until the GPU has passed it. Raises DeviceError if something before it failed."""
        try:
            self._event.synchronize()
        except self._failures as e:
            raise failure("a kernel before this point", e) from e


class Fetch:
    """Copies of arrays that are on their way to pinned memory."""

    def __init__(self, arrays: list[np.ndarray[Any, Any]], event: Event) -> None:
        self._arrays, self._event = arrays, event

    def wait(self) -> list[np.ndarray[Any, Any]]:
        """The copies, once they are there. Raises DeviceError if something before them failed."""
        self._event.synchronize()
        return self._arrays


@dataclass
class _GraphMemory:
    """The memory pool of captured graphs. graphs: how many there are.

    A graph that was captured writes to blocks which the pool takes for free, so none may go back to CUDA before the
    last of them is closed.
    """

    pool: Any
    graphs: int = 0


class CapturedGraph:
    """Repeats a body of calls as one CUDA graph.

    The first replay runs the body call by call, which compiles kernels and makes plans. The second captures it. Both
    take memory from a pool of the graph's own, so that nobody else gets what the graph writes to while it is there;
    graphs that share memory have one pool.
    """

    def __init__(self, backend: _Owner, body: Callable[[], None], sharing: CapturedGraph | None) -> None:
        self._backend, self._gpu, self._body = backend, backend.gpu, body
        self._memory: _GraphMemory = _GraphMemory(backend.gpu.new_pool()) if sharing is None else sharing._memory
        self._memory.graphs += 1
        self._graph: Any = None
        self._warm = False

    def replay(self) -> Event:
        """Queue the body once; the event is behind it. Raises DeviceError if the GPU refuses."""
        with self._gpu as gpu:
            try:
                if self._graph is None:
                    with gpu.drawing_from(self._memory.pool):
                        if self._warm and not self._backend.checking:
                            self._graph = gpu.capture(self._body)
                        else:
                            self._body()
                            self._warm = True
                if self._graph is not None:
                    with self._backend.replay_hook():
                        self._graph.launch(gpu.stream)
                return Event(gpu.event(), gpu.failures)
            except gpu.failures as e:
                raise failure("a captured graph", e) from e

    def close(self) -> None:
        """Give back the graph and its memory. It cannot be replayed afterwards."""
        with self._gpu as gpu, suppress(*gpu.failures):
            self._memory.graphs -= 1
            gpu.synchronize()
            del self._graph, self._body
            if not self._memory.graphs:
                self._memory.pool.free_all_blocks()


def failure(what: str, error: Exception, node: Node | None = None) -> DeviceError:
    """The error for what CUDA complains about: what failed, and at which node, if that is known."""
    hint = "" if node is not None else " (CUPLAMA_CHECK=1 names the node)"
    return DeviceError(f"{f'node {node}: ' if node is not None else ''}{what}: {error}{hint}")
