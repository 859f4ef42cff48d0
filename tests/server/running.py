"""A server that runs: in a thread of this process, or as a process of its own, where signals matter."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from cuplama.server.app import create_app
from cuplama.server.endpoint import Endpoint
from cuplama.server.endpoints import ENDPOINTS
from cuplama.server.service import Service
from tests.cli.processes import LAUNCHER, environment, interruptible

__all__ = ["ServerProcess", "eventually", "in_thread", "read_all"]


def eventually(true: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until something holds; fail where it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


@contextmanager
def in_thread(service: Service, endpoints: Sequence[Endpoint] = ENDPOINTS) -> Iterator[str]:
    """uvicorn with the service's application; yields its address, as in http://127.0.0.1:1234."""
    app = create_app(service, endpoints)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off", http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


class ServerProcess:
    """``cuplama serve`` as a process, on a free port. url: its address; lines: what it wrote on stderr until now."""

    def __init__(self, *args: str, **env: str) -> None:
        command = [*LAUNCHER, "serve", "--device", "numpy", "--port", "0", *args]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=environment(**env), preexec_fn=interruptible
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.said = self.process.stdout.readline()
        self.url = self.said.removeprefix("page: ").strip().rstrip("/")
        assert self.url, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def ready(self) -> ServerProcess:
        """Wait until the model is loaded."""
        eventually(lambda: httpx.get(f"{self.url}/health").status_code == 200, 30)
        return self

    def log(self) -> list[dict[str, Any]]:
        """The log's lines, as far as they are JSON."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def signal(self, sig: signal.Signals) -> None:
        self.process.send_signal(sig)

    def wait(self, seconds: float = 15) -> int:
        """The exit status, once it has ended."""
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def stop(self) -> None:
        """End it, however it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
