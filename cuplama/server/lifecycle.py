"""The life of the server's process: the port opens at once, the model is loaded beside it, signals end it in order."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import DeviceError
from ..model import Model
from .app import create_app
from .endpoint import Endpoint
from .endpoints import ENDPOINTS
from .errors import ApiError, error_body
from .service import Service

__all__ = ["Server", "listen", "serve"]

_KEEP_ALIVE = 75  # seconds that a connection without a request stays open: longer than proxies keep theirs
_CLOSING = 5  # seconds that connections have to close when all requests have ended
# The loop's thread and the engine's share Python's lock. Whoever wants it from a thread that computes waits that long,
# and the engine gives it away about four times in a step, at every call of CUDA: of a step of 1.3 ms (a 1B model, 64
# sequences) Python's own 5 ms leave nothing, and 0.5 ms a third.
_SWITCH_SECONDS = 0.00005


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises DeviceError, in one line, where that does not work: mostly the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named asyncio knows TCP, and sends small pieces at once, not with the next ACK (40 ms).
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as e:
        sock.close()
        raise DeviceError(f"cannot listen on {host}, port {port}: {e.strerror or e}") from None
    return sock


def serve(
    service: Service,
    load: Callable[[], Model],
    sock: socket.socket,
    *,
    drain_seconds: float = 30.0,
) -> None:
    """Answer requests on the socket until a signal comes. Raises what ``load`` raises.

    load: makes the model, in a thread; until it is there requests get 503.
    drain_seconds: what running requests have to end after SIGTERM or SIGINT; a second signal does not wait.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of whatever clients do
    server = Server(service, drain_seconds)
    failed: list[BaseException] = []

    def loading() -> None:
        try:
            service.model = load()
        except BaseException as e:
            failed.append(e)
            server.should_exit = True

    # A daemon: the process may end while it loads.
    threading.Thread(target=loading, name="cuplama-load", daemon=True).start()
    server.run(sockets=[sock])
    if failed:
        raise failed[0]
    if service.model is not None:
        service.model.close()


class _Protocol(H11Protocol):
    """HTTP/1.1, whose own refusals have the form of all other errors."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or has headers that are longer than may be looked at. Called while h11 complains."""
        complaint = sys.exception()
        status = 431 if getattr(complaint, "error_status_hint", 400) == 431 else 400
        body = json.dumps(error_body(ApiError(status, "the headers are too long" if status == 431 else msg))).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with another end: the first signal lets running requests finish, the second ends the process."""

    def __init__(self, service: Service, drain_seconds: float, endpoints: Sequence[Endpoint] = ENDPOINTS) -> None:
        config = uvicorn.Config(
            create_app(service, endpoints),
            http=_Protocol,  # it bounds the size of headers, which httptools does not
            h11_max_incomplete_event_size=2 * service.limits.header_bytes,  # the frame's own limit has a better error
            ws="none",
            lifespan="off",
            loop="auto",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_CLOSING,
        )
        super().__init__(config)
        self.service, self._drain_seconds = service, drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came; called between two operations of the main thread."""
        if self.service.draining:
            sys.stderr.flush()
            os._exit(128 + sig)  # threads of the engine may be in a computation, for which nobody waits now
        self.service.draining = True
        self._deadline = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether the server ends now."""
        if self._deadline is not None and (self.service.running == 0 or time.monotonic() > self._deadline):
            self.config.timeout_graceful_shutdown = _CLOSING if self.service.running == 0 else 0
            self.should_exit = True
        return await super().on_tick(counter)
