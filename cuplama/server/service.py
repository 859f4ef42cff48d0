"""What the endpoints share: the model, under which names it is served, limits, keys, metrics, log, and its state."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.types import Scope

from ..engine.stats import EngineStats
from ..model import Model
from .errors import ApiError, api_error, unavailable
from .keys import Keys
from .limits import Limits
from .log import RequestLog
from .metrics import Metrics

__all__ = ["Service"]


class Service:
    """One model, served.

    names: those under which clients ask for it, the first is the one that answers bear; model: None while it is loaded;
    keys: who may ask; origins: web pages that may (CORS); draining: no new requests are taken, running ones end;
    running: requests under way; created: seconds since 1970.
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
        self.draining = False
        self.running = 0
        self.created = int(time.time())

    @property
    def name(self) -> str:
        """The name that answers bear."""
        return self.names[0]

    @property
    def failure(self) -> str | None:
        """Why the engine's last step failed; None if it did not. A later step may go well, unless the GPU is gone."""
        model = self.model
        error = None if model is None or model.closed else model.engine.failure
        if error is None:
            return None
        return api_error(error).message if isinstance(error, Exception) else type(error).__name__

    @property
    def ready(self) -> bool:
        """Whether requests that need the model are answered."""
        return self.model is not None and self.failure is None and not self.draining

    @property
    def loaded(self) -> Model:
        """The model. Raises ApiError 503 while there is none, and where no new requests are taken.

        Where the engine has failed a request is tried all the same: only a step can tell whether it still fails.
        """
        if self.draining:
            raise unavailable("the server is shutting down")
        if self.model is None:
            raise unavailable("Loading model")
        return self.model

    def check_ready(self) -> None:
        """Raises ApiError 503 that says why requests are not answered now."""
        _ = self.loaded
        if self.failure is not None:
            raise unavailable(f"the engine failed: {self.failure}")

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

    def told(self, error: Exception, scope: Scope) -> ApiError:
        """What the client of a request is told of an error, which is noted in the log.

        A client's mistake is a few fields of the request's line: its message may quote what was asked. What is our
        fault, or the device's, is a line of its own, with the traceback.
        """
        told, state = api_error(error), scope["state"]
        fields = state["meter"].fields
        fields |= {"error": told.type, "param": told.param, "code": told.code}
        if self.log.prompts or told.status >= 500:
            fields["message"] = told.message
        if told.status >= 500 and told is not error:
            self.log.failure(error, id=state["id"], path=scope["path"])
        return told

    def _stats(self) -> EngineStats | None:
        model = self.model
        return None if model is None or model.closed else model.engine.stats
