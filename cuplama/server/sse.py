"""Server-sent events: how a stream of JSON objects goes over HTTP, and how it ends.

An event is a line ``data: JSON`` and an empty line; a line that begins with a colon is a comment, which readers skip:
https://html.spec.whatwg.org/multipage/server-sent-events.html. OpenAI's clients take ``data: [DONE]`` as the end, and
an object with ``error`` as an error: the status was sent before, and cannot say it any more.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "KEEP_ALIVE_SECONDS", "EventStream", "event", "events_with"]

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": still here\n\n"
KEEP_ALIVE_SECONDS = 10.0  # of silence; proxies cut connections that are silent for 30 to 60 seconds
# ASCII alone: some readers take U+2028 or U+0085 for the end of a line as well.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event. name: its ``event:`` line, which OpenAI's older endpoints do not have."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_encode(data)}\n\n".encode()


def events_with(head: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], bytes]:
    """Makes events that all begin with the same fields, which are written once: that halves the time. Neither the head
    nor what is given for an event may be empty.
    """
    begin = f"data: {_encode(head)[:-1]},"
    return lambda rest: f"{begin}{_encode(rest)[1:]}\n\n".encode()


class EventStream(Response):
    """A response of events, which come as bytes, one or several at a time, and of comments where they are silent.

    close: called when the response has ended, in whatever way, also when nothing of it could be sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # the latter is nginx's
        del self.headers["content-length"]
        self._events, self._close = events, close
        self._sending, self._last = asyncio.Lock(), 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come. A reader who is slow makes ``send`` wait, and the next events join."""
        heart: asyncio.Task[None] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            heart = asyncio.create_task(self._keep_alive(send))
            async for part in self._events:
                await self._send(send, part)
            heart.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if heart is not None:
                heart.cancel()
            await self._close()

    async def _send(self, send: Send, part: bytes) -> None:
        async with self._sending:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            self._last = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment after each silence; the events need not wait for a clock of their own."""
        self._last = time.monotonic()
        with suppress(OSError):  # the client has left: whoever sends the events is told
            while True:
                silent = time.monotonic() - self._last
                if silent >= KEEP_ALIVE_SECONDS:
                    await self._send(send, _KEEP_ALIVE)
                else:
                    await asyncio.sleep(KEEP_ALIVE_SECONDS - silent)
