"""A server whose answers a test writes: the real application's page, and an interface that streams what it is told."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from cuplama.server.app import create_app
from cuplama.server.log import RequestLog
from cuplama.server.service import Service
from tests.server.running import eventually

__all__ = ["Script", "scripted"]


@dataclass
class Script:
    """What the server does next, and what it was asked.

    pieces: of the text of an answer; reasoning: pieces before them; pause: seconds before each piece; breaks: the
    stream ends before it is complete; fault: it ends with this error; refusal: status, body and headers in place of an
    answer; asked: the bodies of all requests; closed: answers whose client left; key: the one that is wanted; loading:
    whether /health says so; template: whether the model can chat.
    """

    url: str = ""
    pieces: Sequence[str] = ("An answer.",)
    reasoning: Sequence[str] = ()
    pause: float = 0.0
    breaks: bool = False
    fault: str = ""
    refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: int = 0
    key: str | None = None
    loading: bool = False
    template: bool = True

    def reset(self) -> None:
        """Be as new, at the same address."""
        self.__init__(self.url)  # type: ignore[misc]


def _error(status: int, message: str) -> Response:
    body = {"error": {"message": message, "type": "t", "param": None, "code": status}}
    return JSONResponse(body, status)


class _Interface:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
        ]

    def _refused(self, request: Request) -> Response | None:
        wanted = self.script.key
        if wanted is not None and request.headers.get("authorization") != f"Bearer {wanted}":
            return _error(401, "the API key is missing or wrong")
        return None

    async def health(self, _: Request) -> Response:
        return _error(503, "Loading model") if self.script.loading else JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        model = {"id": "stories-7m", "max_model_len": 1024, "chat_template": self.script.template}
        return self._refused(request) or JSONResponse({"object": "list", "data": [model]})

    async def answer(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        self.script.asked.append(await request.json())
        if self.script.refusal is not None:
            status, body, headers = self.script.refusal
            return JSONResponse(body, status, headers)
        chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(self._stream(chat), media_type="text/event-stream")

    async def _stream(self, chat: bool) -> AsyncIterator[str]:
        s = self.script
        pause = s.pause
        try:
            for name, pieces in (("reasoning", s.reasoning), ("content", s.pieces)):
                for count, piece in enumerate(pieces, 1):
                    await asyncio.sleep(pause)
                    choice = {"index": 0, **({"delta": {name: piece}} if chat else {"text": piece})}
                    yield _event(choices=[choice], usage={"prompt_tokens": 7, "completion_tokens": count})
            if s.fault:
                yield _event(error={"message": s.fault, "type": "server_error", "param": None, "code": None})
            if s.breaks or s.fault:
                return
            yield _event(choices=[{"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "stop"}])
            yield _event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": len(s.pieces)})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            s.closed += 1
            raise


def _event(**data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


@contextmanager
def scripted() -> Iterator[Script]:
    """A running server with its script, on a free port of this machine."""
    script = Script()
    app = Starlette(
        routes=[
            *_Interface(script).routes,
            Mount("/", create_app(Service(["stories-7m"], log=RequestLog(io.StringIO())))),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        script.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        yield script
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
