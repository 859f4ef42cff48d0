"""When the GPU begins and ends each captured graph: events before and behind every replay, in its own queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.model import Model

__all__ = ["replay_events"]


@contextmanager
def replay_events(model: Model) -> Iterator[list[tuple[Any, Any]]]:
    """Inside, the list gets CuPy's (begin, end) events of every replay; afterwards all of them have passed."""
    import cupy

    backend, events = model.backend, list[tuple[Any, Any]]()
    assert isinstance(backend, CudaBackend)
    stream, plain = backend.gpu.stream, backend.replay_hook

    @contextmanager
    def between_events() -> Iterator[None]:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        yield
        end.record(stream)
        events.append((begin, end))

    backend.replay_hook = between_events
    try:
        yield events
    finally:
        backend.replay_hook = plain
    events[-1][1].synchronize()
