"""A GPU that fails in the middle, by a stand-in: requests end with an error, and the server says that it is ill."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import cuplama
from cuplama.errors import DeviceError
from tests.server.live import Live, serving
from tests.server.running import eventually

BODY = {"model": "stories-7m", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
WORDS = "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"


@pytest.fixture
def live(model_folder: Path) -> Iterator[Live]:
    """A server with a model of its own, which does not outlive the test."""
    with cuplama.load(model_folder, device="numpy") as model, serving(model) as live:
        yield live


def break_device(live: Live) -> None:
    """From now on every node of a pass fails, as after a fault of a kernel."""

    def fail(*_: Any, **__: Any) -> None:
        raise DeviceError(WORDS)

    live.model.backend.run = fail  # type: ignore[assignment, method-assign]


def test_requests_get_500_and_the_server_says_that_it_is_ill(live: Live) -> None:
    assert httpx.get(f"{live.url}/health").status_code == 200
    break_device(live)
    first = httpx.post(f"{live.url}/v1/completions", json=BODY)
    assert first.status_code == 500
    assert first.json()["error"]["type"] == "server_error"
    assert WORDS in first.json()["error"]["message"]
    ill = httpx.get(f"{live.url}/health")
    assert ill.status_code == 503
    assert WORDS in ill.json()["error"]["message"]
    # Another is tried all the same: only a step can tell whether it still fails.
    assert httpx.post(f"{live.url}/v1/completions", json=BODY).status_code == 500
    live.wait_idle()
    assert httpx.get(f"{live.url}/health").status_code == 503
    assert httpx.get(f"{live.url}/v1/models").status_code == 200  # what needs no engine goes on
    assert httpx.get(f"{live.url}/metrics").status_code == 200
    line = next(line for line in live.log() if "traceback" in line)
    assert "DeviceError" in line["traceback"]
    del live.model.backend.run  # as if a fault had passed, such as too little memory
    assert httpx.post(f"{live.url}/v1/completions", json={**BODY, "max_tokens": 3}).status_code == 200
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_streams_end_with_an_error(live: Live) -> None:
    """All that are under way get one, and none hangs. The status was sent before, so the error is an event."""
    ends: list[list[dict[str, Any]]] = []
    started = threading.Semaphore(0)

    def read() -> None:
        with httpx.stream("POST", f"{live.url}/v1/completions", json={**BODY, "stream": True}, timeout=20) as stream:
            assert stream.status_code == 200
            events = []
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                    started.release()
            ends.append(events)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        assert started.acquire(timeout=20)
    break_device(live)
    for thread in threads:
        thread.join(20)
    assert [events[-1].get("error", {}).get("type") for events in ends] == ["server_error"] * 3
    assert WORDS in ends[0][-1]["error"]["message"]
    eventually(lambda: httpx.get(f"{live.url}/health").status_code == 503)


def test_logits_that_are_not_finite_fail_one_request_alone(live: Live) -> None:
    """What overflows in one text is no broken GPU: the others go on, and the server is well."""
    wanted = live.model.generate("The dog", max_tokens=60, ignore_eos=True, temperature=0).text
    texts: list[str] = []
    body = {**BODY, "prompt": "The dog", "max_tokens": 60}
    other = threading.Thread(
        target=lambda: texts.append(httpx.post(f"{live.url}/v1/completions", json=body).json()["choices"][0]["text"])
    )
    with httpx.stream("POST", f"{live.url}/v1/completions", json={**BODY, "stream": True}, timeout=20) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        (bad,) = live.model.engine.scheduler.running
        other.start()
        eventually(lambda: len(live.model.engine.scheduler.running) == 2)
        live.model.engine.cache.arrays["0.cache.k"][bad.pages[0]] = np.nan
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    other.join(20)
    error = events[-1]["error"]
    assert error["type"] == "server_error"
    assert "finite" in error["message"]
    assert texts == [wanted]
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.post(f"{live.url}/v1/completions", json=body).json()["choices"][0]["text"] == wanted
    live.wait_idle()
