"""The process: it opens its port at once, drains after a signal, stops after the second."""

from __future__ import annotations

import signal
from collections.abc import Callable

import httpx

from tests.server.running import ServerProcess

Start = Callable[..., ServerProcess]


def test_it_serves_and_ends_with_status_0(run_server: Start) -> None:
    server = run_server().ready()
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "stories-7m"
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
