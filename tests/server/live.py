"""A server that listens, beside its model: tests compare what clients get with what the library gives."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cuplama.errors import BusyError
from cuplama.model import Model
from cuplama.server.limits import Limits
from cuplama.server.log import RequestLog
from cuplama.server.service import Service
from tests.server.running import eventually, in_thread

__all__ = ["Live", "serving"]


class Live:
    """model: the one that is served; url: as in http://127.0.0.1:1234; name: what clients call the model."""

    def __init__(self, service: Service, model: Model, url: str, lines: io.StringIO) -> None:
        self.service, self.model, self.url, self.name = service, model, url, service.name
        self._lines = lines

    def log(self) -> list[dict[str, Any]]:
        """The lines that were logged until now."""
        return [json.loads(line) for line in self._lines.getvalue().splitlines()]

    def idle(self) -> bool:
        """Whether no request is under way, and no sequence holds anything of the engine."""
        stats = self.model.engine.stats
        return (self.service.running, stats.running, stats.waiting, stats.pages_used) == (0, 0, 0, 0)

    def wait_idle(self, seconds: float = 3.0) -> None:
        """Fails unless everything is free by then."""
        eventually(self.idle, seconds)

    @contextmanager
    def busy(self, refusals: int) -> Iterator[Callable[[], int]]:
        """The next calls of the model are refused, as where too many wait. Yields a function: how many were."""
        refused, astream = 0, self.model.astream

        def refuse(*args: Any, **options: Any) -> Any:
            nonlocal refused
            if refused < refusals:
                refused += 1
                raise BusyError("too many requests are waiting")
            return astream(*args, **options)

        self.model.astream = refuse  # type: ignore[method-assign]
        try:
            yield lambda: refused
        finally:
            del self.model.astream


@contextmanager
def serving(model: Model, *, limits: Limits | None = None, keys: tuple[str, ...] = ()) -> Iterator[Live]:
    """The model behind a port, as "stories-7m"."""
    lines = io.StringIO()
    service = Service(["stories-7m"], model, limits=limits, keys=keys, log=RequestLog(lines))
    with in_thread(service) as url:
        yield Live(service, model, url, lines)
