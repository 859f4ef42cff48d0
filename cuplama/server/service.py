"""What the endpoints share: the model, under which names it is served, limits, keys, metrics, log, and its state."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..engine.stats import EngineStats
from ..errors import DeviceError
from ..model import Model
from .errors import ApiError
from .keys import Keys
from .limits import Limits
from .log import RequestLog
from .metrics import Metrics

__all__ = ["Service"]


class Service:
    """One model, served.

    names: those under which clients ask for it, the first is the one that answers bear; model: None while it is loaded;
    keys: who may ask; origins: web pages that may (CORS); failure: why the engine cannot go on, in a line, or None;
    draining: no new requests are taken, running ones end; running: requests under way; created: seconds since 1970.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: Model | None = None,
        *,
        limits: Limits | None = None,
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
        log: RequestLog | None = None,
    ) -> None:
        self.names, self.model = tuple(names), model
        self.limits, self.keys, self.origins = limits or Limits(), Keys(keys), tuple(origins)
        self.log = log or RequestLog()
        self.metrics = Metrics(self.name, self._stats)
        self.failure: str | None = None
        self.draining = False
        self.running = 0
        self.created = int(time.time())

    @property
    def name(self) -> str:
        """The name that answers bear."""
        return self.names[0]

    @property
    def ready(self) -> bool:
        """Whether requests that need the model can be answered."""
        return self.model is not None and not self.failed and not self.draining

    @property
    def failed(self) -> bool:
        """Whether the engine cannot go on."""
        return self.failure is not None

    def check_ready(self) -> None:
        """Raises ApiError 503 that says why no request can be answered now. The codes are llama.cpp's."""
        said = None
        if self.failure is not None:
            said = f"the engine failed: {self.failure}"
        elif self.draining:
            said = "the server is shutting down"
        elif self.model is None:
            said = "Loading model"
        if said is not None:
            raise ApiError(503, said, "unavailable_error", code=503)

    @property
    def loaded(self) -> Model:
        """The model. Raises ApiError 503 as ``check_ready`` does."""
        self.check_ready()
        assert self.model is not None
        return self.model

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 for a name under which no model is served; None and "" stand for the one there is."""
        if name and name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r:.200} is not served here; served: {', '.join(self.names)}",
                "not_found_error",
                "model",
                "model_not_found",
            )

    def noticed(self, error: Exception) -> None:
        """Take note of an error of a request: one that the engine does not survive makes the service fail."""
        if isinstance(error, DeviceError) and self.model is not None:
            self.failure = getattr(self.model.engine, "failure", None)

    def _stats(self) -> EngineStats | None:
        model = self.model
        return None if model is None or model.closed else model.engine.stats
