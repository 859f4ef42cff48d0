"""What happens around every request, with endpoints made for it: ids, errors, the client that leaves, the log."""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from cuplama.errors import BusyError, DeviceError
from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.endpoint import Endpoint
from cuplama.server.limits import Limits, read_object
from cuplama.server.log import RequestLog
from cuplama.server.service import Service
from tests.server.conftest import Log
from tests.server.running import eventually, in_thread, read_all

pytestmark = pytest.mark.anyio
STOPPED: list[str] = []  # the handlers that were cancelled


async def _bug(_: Service, __: Request) -> Response:
    raise KeyError("a bug")


async def _busy(_: Service, __: Request) -> Response:
    raise BusyError("4 requests are waiting already")


async def _broken(_: Service, __: Request) -> Response:
    raise DeviceError("the GPU reports an illegal address")


async def _endless(_: Service, __: Request) -> Response:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        STOPPED.append("endless")
        raise
    raise AssertionError


async def _stream(_: Service, request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            request.state.meter.tokens(1)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            STOPPED.append("stream")
            raise

    return StreamingResponse(parts())


async def _clumsy(_: Service, __: Request) -> Response:
    try:
        await asyncio.sleep(60)
    finally:
        raise KeyError("a bug in what follows")


async def _cut(_: Service, __: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield b"begun"
        raise KeyError("a bug in the middle")

    return StreamingResponse(parts())


async def _echo(service: Service, request: Request) -> Response:
    return PlainTextResponse(str(len(await read_object(request, service.limits))))


ENDPOINTS = (
    Endpoint("GET", "/bug", _bug, "A bug."),
    Endpoint("GET", "/busy", _busy, "Busy."),
    Endpoint("GET", "/broken", _broken, "A broken GPU."),
    Endpoint("GET", "/endless", _endless, "Computes for a minute."),
    Endpoint("GET", "/stream", _stream, "Streams for a minute."),
    Endpoint("GET", "/clumsy", _clumsy, "Fails when it is stopped."),
    Endpoint("GET", "/cut", _cut, "Breaks in the middle of a stream."),
    Endpoint("POST", "/echo", _echo, "The number of fields."),
)


@pytest.fixture
def service(model: Model, log_stream: io.StringIO) -> Service:
    return Service(["m"], model, limits=Limits(body_seconds=0.2, body_bytes=1000), log=RequestLog(log_stream))


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(service, ENDPOINTS))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def url(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    STOPPED.clear()
    with in_thread(service, ENDPOINTS) as address:
        yield address


async def test_a_bug_is_an_error_in_json_and_in_the_log(client: httpx.AsyncClient, log: Log) -> None:
    response = await client.get("/bug", headers={"X-Request-Id": "mine"})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error; the server's log has more",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    failure, line = log()
    assert failure["id"] == line["id"] == response.headers["x-request-id"] == "mine"
    assert "in _bug" in failure["traceback"]
    assert (line["status"], line["method"], line["path"], line["client"]) == (500, "GET", "/bug", "127.0.0.1")
    assert (await client.post("/echo", json={"a": 1})).text == "1"  # it goes on


@pytest.mark.parametrize("asked", ["", "a" * 129, "two words", "böse"])
async def test_an_id_that_cannot_be_one_is_replaced(client: httpx.AsyncClient, log: Log, asked: str) -> None:
    response = await client.get("/busy", headers={b"X-Request-Id": asked.encode("latin-1")})
    assert len(response.headers["x-request-id"]) == 32
    assert log()[0]["id"] == response.headers["x-request-id"]


async def test_who_finds_the_server_busy_is_told_when_to_come_again(client: httpx.AsyncClient, log: Log) -> None:
    response = await client.get("/busy")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["type"] == "rate_limit_exceeded"
    assert (log()[0]["status"], log()[0]["error"]) == (429, "rate_limit_exceeded")


async def test_a_broken_gpu_is_told_and_logged(client: httpx.AsyncClient, log: Log) -> None:
    response = await client.get("/broken")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the GPU reports an illegal address"
    assert "traceback" in log()[0]


@pytest.mark.parametrize("path", ["endless", "stream"])
def test_a_client_that_leaves_is_noticed(url: str, service: Service, log: Log, path: str) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as sock:
        sock.sendall(f"GET /{path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        if path == "stream":
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        eventually(lambda: service.running == 1)
        time.sleep(0.05)
    eventually(lambda: service.running == 0, 1)
    assert [path] == STOPPED
    (line,) = log()
    assert (line["status"], line.get("finish")) == (499, "abort" if path == "stream" else None)


def test_what_fails_when_a_client_has_left_is_logged(url: str, service: Service, log: Log) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{url}/clumsy", timeout=0.1)
    eventually(lambda: len(log()) == 2)
    failure, line = log()
    assert (failure["id"], failure["error"], line["status"]) == (line["id"], "KeyError('a bug in what follows')", 499)


def test_an_error_in_the_middle_of_a_stream_ends_the_connection(url: str, log: Log) -> None:
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", f"{url}/cut") as response:
        response.read()
    assert "a bug in the middle" in log()[0]["error"]
    assert httpx.post(f"{url}/echo", json={}).text == "0"


def test_a_body_that_does_not_come_is_not_waited_for(url: str) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n{")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"within 0.2 seconds" in answer


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_too_much_still_reads_why(url: str, chunked: bool) -> None:
    content = iter([b"x" * 100_000] * 20) if chunked else b"x" * 2_000_000
    response = httpx.post(f"{url}/echo", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the body has more than 1000 bytes"


def test_who_asks_before_sending_too_much_is_told_at_once(url: str) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 5000\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_connection_is_used_again(url: str, log: Log) -> None:
    with httpx.Client() as client:
        answers = [client.post(f"{url}/echo", json={"a": 1, "b": 2}).text for _ in range(3)]
    assert answers == ["2"] * 3
    eventually(lambda: [line["status"] for line in log()] == [200] * 3)  # a line comes after its response


async def test_no_prompt_is_in_the_log_unless_asked(client: httpx.AsyncClient, service: Service, log: Log) -> None:
    content, json = b'{"prompt": "secret"', {"Content-Type": "application/json"}
    await client.post("/echo", content=content, headers=json)
    service.log.prompts = True
    await client.post("/echo", content=content, headers=json)
    silent, open_ = log()
    assert silent["error"] == open_["error"] == "invalid_request_error"
    assert not {"message", "body"} & silent.keys()
    assert open_["message"].startswith("the body is not JSON")
    assert open_["body"] == '{"prompt": "secret"'
