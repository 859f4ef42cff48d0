"""The process: it opens its port at once, drains after a signal, stops after the second."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from cuplama.errors import ConfigError, DeviceError
from cuplama.model import Model
from cuplama.server import lifecycle
from cuplama.server.endpoint import Endpoint
from cuplama.server.endpoints.health import ENDPOINTS as HEALTH
from cuplama.server.limits import Limits
from cuplama.server.log import RequestLog
from cuplama.server.service import Service
from tests.cli.processes import environment, interruptible
from tests.paths import ROOT
from tests.server.running import ServerProcess, eventually, read_all

Start = Callable[..., ServerProcess]


async def _slow(service: Service, request: Request) -> Response:
    _ = service.loaded
    print("asked", flush=True)  # a test that has started a process reads it
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("done")


SLOW = (*HEALTH, Endpoint("GET", "/slow", _slow, "Sleeps."))


class Asking:
    """A request in a thread: its response, or what it ended with."""

    def __init__(self, url: str) -> None:
        self.response: httpx.Response | None = None
        self.error: httpx.HTTPError | None = None
        self._thread = threading.Thread(target=self._ask, args=(url,))
        self._thread.start()

    def _ask(self, url: str) -> None:
        try:
            self.response = httpx.get(url, timeout=20)
        except httpx.HTTPError as e:
            self.error = e

    def join(self) -> Asking:
        self._thread.join()
        return self


@contextmanager
def slow_server(model: Model, drain_seconds: float) -> Iterator[tuple[lifecycle.Server, str, threading.Thread]]:
    """A server in a thread; signals are calls of ``handle_exit``."""
    service = Service(["m"], model, limits=Limits(header_bytes=1000), log=RequestLog(io.StringIO()))
    server = lifecycle.Server(service, drain_seconds, SLOW)
    sock = lifecycle.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{sock.getsockname()[1]}", thread
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        sock.close()


def test_running_requests_end_and_new_ones_are_refused(model: Model) -> None:
    with slow_server(model, drain_seconds=20) as (server, url, thread):
        running = Asking(f"{url}/slow?seconds=1")  # longer than both requests below on a busy machine
        eventually(lambda: server.service.running == 1)
        server.handle_exit(signal.SIGTERM, None)
        for path in ("slow?seconds=0", "health"):
            response = httpx.get(f"{url}/{path}")
            assert (response.status_code, response.json()["error"]["message"]) == (503, "the server is shutting down")
        done = running.join().response
        assert done is not None
        assert done.text == "done"
        thread.join(5)
        assert not thread.is_alive()


def test_people_are_told_once_that_the_server_waits() -> None:
    said: list[str] = []
    server = lifecycle.Server(Service(["m"]), 20, SLOW, said.append)
    server.service.running = 2
    asyncio.run(server.on_tick(1))
    assert said == []
    server.handle_exit(signal.SIGTERM, None)
    for _ in range(2):
        asyncio.run(server.on_tick(1))
    assert said == ["shutting down: requests that run (2) have 20 seconds; a second signal ends them"]


def test_nobody_is_waited_for_longer_than_said(model: Model) -> None:
    with slow_server(model, drain_seconds=0.1) as (server, url, thread):
        running = Asking(f"{url}/slow?seconds=30")
        eventually(lambda: server.service.running == 1)
        server.handle_exit(signal.SIGTERM, None)
        response = running.join().response
        assert response is not None
        assert response.status_code == 503
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT"])
def test_headers_are_not_waited_for_for_ever(sent: bytes, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_HEADER_SECONDS", 0.2)
    with slow_server(model, drain_seconds=0) as (_, url, __):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=5) as sock:
            for byte in sent:
                sock.sendall(bytes([byte]))
            assert read_all(sock) == b""


def test_a_request_may_take_longer_than_its_headers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_HEADER_SECONDS", 0.1)
    with slow_server(model, drain_seconds=0) as (_, url, __), httpx.Client() as client:
        for _ in range(2):
            assert client.get(f"{url}/slow?seconds=0.3").text == "done"
            time.sleep(0.2)  # between two requests uvicorn's clock counts


def test_headers_that_are_too_long_are_refused(model: Model) -> None:
    with slow_server(model, drain_seconds=0) as (_, url, __):
        for size in (1500, 3000):  # the frame refuses those, and uvicorn these
            response = httpx.get(f"{url}/health", headers={"X-Long": "x" * size})
            assert response.status_code == 431
            assert response.json()["error"]["type"] == "invalid_request_error"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as sock:
            sock.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'{"error": {"message": "Invalid HTTP request received."' in answer
        assert httpx.get(f"{url}/health").status_code == 200


@contextmanager
def serving(load: Callable[[], Model], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[BaseException]]]:
    """``lifecycle.serve`` in a thread; its address, and what it raised."""
    servers: list[lifecycle.Server] = []
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)

    class Noted(lifecycle.Server):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            servers.append(self)

    monkeypatch.setattr(lifecycle, "Server", Noted)
    sock, raised = lifecycle.listen("127.0.0.1", 0), list[BaseException]()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"

    def run() -> None:
        try:
            lifecycle.serve(Service(["m"], log=RequestLog(io.StringIO())), load, sock)
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield url, raised
    finally:
        eventually(lambda: servers)
        servers[0].handle_exit(signal.SIGTERM, None)
        thread.join(10)
        assert not thread.is_alive()


def test_the_port_is_open_while_the_model_is_loaded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    there = threading.Event()
    closed: list[Model] = []

    def load() -> Model:
        assert there.wait(10)
        return model

    monkeypatch.setattr(Model, "close", lambda self: closed.append(self))
    with serving(load, monkeypatch) as (url, raised):
        assert httpx.get(f"{url}/health").json()["error"]["message"] == "Loading model"
        there.set()
        eventually(lambda: httpx.get(f"{url}/health").status_code == 200)
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "m"
    assert (closed, raised) == ([model], [])


def test_a_model_that_cannot_be_loaded_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Model:
        raise ConfigError("there is no such model")

    with serving(load, monkeypatch) as (url, raised):
        eventually(lambda: raised)
        assert isinstance(raised[0], ConfigError)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_port_that_is_taken_is_named() -> None:
    with lifecycle.listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(DeviceError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            lifecycle.listen("127.0.0.1", port)
    with pytest.raises(DeviceError, match=r"cannot listen on no\.such\.host\.invalid, port 1: "):
        lifecycle.listen("no.such.host.invalid", 1)


def test_a_process_serves_and_ends(run_server: Start) -> None:
    server = run_server().ready()
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "stories-7m"
    httpx.get(f"{server.url}/nothing", headers={"X-Request-Id": "mine"})
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    (line,) = [line for line in server.log() if line["id"] == "mine"]
    assert (line["path"], line["status"]) == ("/nothing", 404)
    assert not any("Traceback" in line for line in server.lines)


_SLOW_PROCESS = """
import sys
from cuplama.server import lifecycle
from cuplama.server.service import Service
from tests.server.test_lifecycle import SLOW
service = Service(["m"])
service.model = "stands in for a model"
service._stats = lambda: None
sock = lifecycle.listen("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
lifecycle.Server(service, 60, SLOW).run(sockets=[sock])
"""


def test_a_second_signal_stops_a_process_at_once() -> None:
    env = environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", _SLOW_PROCESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, preexec_fn=interruptible) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            running = Asking(f"{url}/slow?seconds=30")
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGTERM)
            eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 128 + signal.SIGTERM
            assert running.join().error is not None
        finally:
            process.kill()
