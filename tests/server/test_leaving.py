"""Clients that leave, in every phase of a request, and clients that read slowly: nothing is held for them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import httpx
import pytest

from tests.server.live import Live
from tests.server.raw import connected, post, reset
from tests.server.running import eventually

# Whatever happens to a test's client, this comes to its end only after seconds.
ENDLESS = {
    "model": "stories-7m",
    "prompt": "Once",
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0.9,
    "seed": 1,
}
STREAM = {**ENDLESS, "stream": True}
LONG = {**STREAM, "prompt": [[i % 4000 + 1 for i in range(j, j + 900)] for j in range(20)]}  # seconds of prompts
CHAT = {"model": "stories-7m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 800, "ignore_eos": True}


def computing(live: Live) -> bool:
    return live.model.engine.stats.pages_used > 0


def nothing(_: socket.socket, __: Live) -> None:
    pass


def a_part_of_the_headers(sock: socket.socket, _: Live) -> None:
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: te")


def a_part_of_the_body(sock: socket.socket, _: Live) -> None:
    sock.sendall(post("/v1/completions", b'{"prompt": "On', length=1000))


def a_request(path: str, body: Any) -> Callable[[socket.socket, Live], None]:
    def send(sock: socket.socket, live: Live) -> None:
        sock.sendall(post(path, body))
        eventually(lambda: computing(live))

    return send


def chunks(path: str, body: Any, count: int) -> Callable[[socket.socket, Live], None]:
    def read(sock: socket.socket, _: Live) -> None:
        sock.sendall(post(path, body))
        got = b""
        while got.count(b"data: ") < count:
            got += sock.recv(4096)

    return read


PHASES: dict[str, Callable[[socket.socket, Live], None]] = {
    "before a byte": nothing,
    "in the headers": a_part_of_the_headers,
    "in the body": a_part_of_the_body,
    "before the answer": a_request("/v1/completions", ENDLESS),
    "before the answer of a chat": a_request("/v1/chat/completions", CHAT),
    "while prompts are read": a_request("/v1/completions", LONG),
    "before the first chunk": a_request("/v1/completions", STREAM),
    "after the first chunk": chunks("/v1/completions", STREAM, 1),
    "between chunks": chunks("/v1/completions", STREAM, 6),
    "in a chat": chunks("/v1/chat/completions", {**CHAT, "stream": True}, 3),
    "of several choices": chunks("/v1/completions", {**STREAM, "n": 4}, 5),
}


LEAVING = list(zip(PHASES, cycle((socket.socket.close, reset)), strict=False))


@pytest.mark.parametrize(("phase", "leave"), LEAVING)
def test_a_client_that_leaves_is_noticed_within_a_second(
    live: Live, phase: str, leave: Callable[[socket.socket], None]
) -> None:
    sock = connected(live.url)
    PHASES[phase](sock, live)
    leave(sock)
    live.wait_idle(1.0)
    body = {"model": "stories-7m", "prompt": "The dog", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{live.url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == live.model.generate("The dog", temperature=0, max_tokens=3).text


def test_the_log_says_that_a_client_left(live: Live) -> None:
    sock = connected(live.url)
    chunks("/v1/completions", STREAM, 2)(sock, live)
    sock.close()
    live.wait_idle()
    line = live.log()[-1]
    assert (line["path"], line["finish"]) == ("/v1/completions", "abort")
    assert line["completion_tokens"] >= 2


def test_leaving_does_not_disturb_others(live: Live) -> None:
    """A stream goes on to its end, and is right, while others come and leave."""
    wanted = live.model.generate("The cat", temperature=0, max_tokens=40, ignore_eos=True).text
    body = {"model": "stories-7m", "prompt": "The cat", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    with httpx.stream("POST", f"{live.url}/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        for _ in range(5):
            sock = connected(live.url)
            chunks("/v1/completions", STREAM, 1)(sock, live)
            reset(sock)
        rest = "\n".join(lines)
    assert rest.rstrip().endswith("data: [DONE]")
    assert httpx.post(f"{live.url}/v1/completions", json=body).json()["choices"][0]["text"] == wanted


def test_a_slow_reader_gets_all_and_holds_nobody_up(live: Live) -> None:
    body = {**STREAM, "max_tokens": 150, "logprobs": 5, "temperature": 0}
    slow = connected(live.url, receive_bytes=2048)
    slow.sendall(post("/v1/completions", body, headers="Connection: close\r\n"))
    start = time.perf_counter()
    quick = httpx.post(f"{live.url}/v1/completions", json={**ENDLESS, "max_tokens": 5}, timeout=10)
    assert quick.status_code == 200
    assert time.perf_counter() - start < 5
    got = b""
    while part := slow.recv(512):
        got += part
    slow.close()
    assert got.rstrip().endswith(b"data: [DONE]\r\n\r\n0") or b"data: [DONE]" in got[-40:]
    assert got.count(b'"finish_reason":"length"') + got.count(b'"finish_reason": "length"') == 1
    live.wait_idle()


def test_a_reader_that_stops_reading_can_leave(live: Live) -> None:
    sock = connected(live.url, receive_bytes=2048)
    sock.sendall(post("/v1/completions", {**STREAM, "logprobs": 5, "n": 2}))
    sock.recv(16)
    time.sleep(0.3)  # its buffers fill meanwhile
    reset(sock)
    live.wait_idle()
