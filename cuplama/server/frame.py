"""What happens around every request: its id, keys, limits, errors, the client that leaves, the line in the log."""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .endpoint import Endpoint
from .errors import ClientGoneError, error_body, error_response, unavailable
from .limits import check_headers, read_body
from .metrics import Meter
from .service import Service

__all__ = ["Answering", "Frame"]

_GONE = 499  # the log's status of a request whose client left; no HTTP status says that
_ID = re.compile(r"[\x21-\x7e]{1,128}")  # an id that a client may choose: it goes into a header and the log


class Frame:
    """The outermost part of the application: whatever happens inside, the client gets a response and the log a line."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self.service, scope, send)
        self.service.running += 1
        try:
            check_headers(scope, self.service.limits)
            await self.app(scope, receive, exchange.send)
        except ClientGoneError:
            exchange.status = _GONE
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            await exchange.fail(unavailable("the server is shutting down"), receive)
        except Exception as e:
            await exchange.fail(e, receive)
        finally:
            self.service.running -= 1
            exchange.log()


class _Exchange:
    """One request and what was sent for it. status: of the response, 0 while nothing was sent."""

    def __init__(self, service: Service, scope: Scope, send: Send) -> None:
        self.service, self.scope, self._send = service, scope, send
        asked = Headers(scope=scope).get("x-request-id", "")
        self.id = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        self.meter: Meter = service.metrics.request()
        scope.setdefault("state", {}).update(meter=self.meter, id=self.id)
        self.status = 0

    @property
    def endpoint(self) -> Endpoint | None:
        """The endpoint that the request is for, as far as that is known."""
        found = self.scope.get("endpoint")
        return found.endpoint if isinstance(found, Answering) else None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.id
        await self._send(message)

    async def fail(self, error: Exception, receive: Receive) -> None:
        """Answer with the error, if nothing was sent yet; else the connection ends in the middle of the answer."""
        told = self.service.told(error, self.scope)
        if not self.status:
            body = self.endpoint.error_body if self.endpoint is not None else error_body
            await error_response(told, body)(self.scope, receive, self.send)

    def log(self) -> None:
        """Write the line, and count the request."""
        self.meter.close()
        client = self.scope.get("client")
        path = "none" if self.endpoint is None else self.endpoint.path
        method = self.scope["method"]
        self.service.metrics.answered(method if path != "none" else "none", path, self.status)
        if self.endpoint is not None and self.endpoint.quiet and self.status < 400:
            return
        self.service.log.write(
            id=self.id,
            method=method,
            path=self.scope["path"],
            status=self.status,
            client=client and client[0],
            seconds=round(self.meter.seconds, 4),
            **self.meter.fields,
        )


class Answering:
    """An endpoint as ASGI: checks the key, reads the body, runs the handler, and cancels it when the client leaves."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self.service, self.endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.endpoint.open:
            self.service.keys.check(Headers(scope=scope))
        body = await read_body(scope, receive, self.service.limits)
        if self.service.log.prompts and body:
            scope["state"]["meter"].fields["body"] = body.decode(errors="replace")
        over = asyncio.Event()  # the client has left, or has its whole answer

        async def sending(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                over.set()

        work = asyncio.create_task(self._answer(Request(scope, _Replay(body, over)), sending))
        watch = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not over.is_set():
                raise ClientGoneError
            await work
        finally:
            over.set()
            watch.cancel()
            work.cancel()
            if not work.done():
                await asyncio.wait((work,))  # what it holds of the engine is free when the request is over
                if not work.cancelled() and (error := work.exception()) is not None:
                    self.service.log.failure(error, id=scope["state"]["id"], path=scope["path"])

    async def _answer(self, request: Request, send: Send) -> None:
        response = await self.endpoint.handler(self.service, request)
        await response(request.scope, request.receive, send)


class _Replay:
    """``receive`` for a handler whose body was read already: the body, and then the end, when it comes."""

    def __init__(self, body: bytes, over: asyncio.Event) -> None:
        self._body: bytes | None = body
        self._over = over

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
