"""How a server process ends, in an orderly way or not, and how the next one begins."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest

from tests.server.running import ServerProcess, eventually

Start = Callable[..., ServerProcess]
STREAM = {"model": "stories-7m", "prompt": "Once", "max_tokens": 250, "ignore_eos": True, "stream": True}


class Reading:
    """A stream that has begun. ended: it came to its end as the server meant it; otherwise it was cut off."""

    def __init__(self, url: str, tokens: int) -> None:
        self._client = httpx.Client(timeout=30)
        request = self._client.build_request("POST", f"{url}/v1/completions", json={**STREAM, "max_tokens": tokens})
        self._stream = self._client.send(request, stream=True)
        self._lines = self._stream.iter_lines()
        assert next(self._lines).startswith("data: {")
        self.ended = False

    def rest(self) -> Reading:
        """Read on until nothing more comes."""
        with suppress(httpx.RemoteProtocolError, httpx.ReadError):
            for line in self._lines:
                self.ended = self.ended or line == "data: [DONE]"
        self._client.close()
        return self


def test_running_requests_end_after_sigterm_and_new_ones_are_refused(run_server: Start) -> None:
    server = run_server().ready()
    stream = Reading(server.url, 120)
    server.signal(signal.SIGTERM)
    eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    refused = httpx.post(f"{server.url}/v1/completions", json=STREAM)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert stream.rest().ended
    assert server.wait() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    (line,) = [line for line in server.log() if line.get("completion_tokens") == 120]
    assert line["finish"] == "length"


@pytest.mark.slow
def test_requests_that_take_too_long_are_cut_off(run_server: Start) -> None:
    server = run_server("--drain-seconds", "0.5").ready()
    stream = Reading(server.url, 1000)
    start = time.monotonic()
    server.signal(signal.SIGTERM)
    assert not stream.rest().ended
    assert server.wait() == 0
    assert time.monotonic() - start < 4


def test_after_a_kill_the_same_port_serves_again(run_server: Start) -> None:
    first = run_server().ready()
    port = first.url.rsplit(":", 1)[1]
    body = {"model": "stories-7m", "prompt": "Once", "max_tokens": 8, "temperature": 0}
    wanted = httpx.post(f"{first.url}/v1/completions", json=body).json()["choices"][0]["text"]
    stream = Reading(first.url, 900)
    first.signal(signal.SIGKILL)
    assert not stream.rest().ended
    second = run_server("--port", port).ready()
    assert second.url == first.url
    assert httpx.post(f"{second.url}/v1/completions", json=body).json()["choices"][0]["text"] == wanted
