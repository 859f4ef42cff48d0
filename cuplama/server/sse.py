"""Server-sent events: how a stream of JSON objects goes over HTTP, and how it ends.

An event is a line ``data: JSON`` and an empty line; a line that begins with a colon is a comment, which readers skip:
https://html.spec.whatwg.org/multipage/server-sent-events.html. OpenAI's clients take ``data: [DONE]`` as the end, and
an object with ``error`` as an error: the status was sent before, and cannot say it any more.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "KEEP_ALIVE", "KEEP_ALIVE_SECONDS", "EventStream", "event"]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still here\n\n"
KEEP_ALIVE_SECONDS = 10.0  # of silence; proxies cut connections that are silent for 30 to 60 seconds
# ASCII alone: some readers take U+2028 or U+0085 for the end of a line as well.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event. name: its ``event:`` line, which OpenAI's older endpoints do not have."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_encode(data)}\n\n".encode()


class EventStream(Response):
    """A response of events, which come as bytes, one or several at a time.

    close: called when the response has ended, in whatever way, also when nothing of it could be sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # the latter is nginx's
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come. A reader who is slow makes ``send`` wait, and the next events join."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in self._events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._close()
