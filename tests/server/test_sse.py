"""Server-sent events: their form, joined pieces, silence, errors in the middle, readers who leave or are slow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from cuplama.errors import BusyError, DeviceError
from cuplama.model import Model
from cuplama.server import sse
from cuplama.server.endpoints.completions import ENDPOINTS
from cuplama.server.limits import Limits
from cuplama.server.service import Service
from cuplama.server.sse import DONE, EventStream, event, events_with, text_events
from tests.server.conftest import Log
from tests.server.running import eventually
from tests.server.stand_ins import Step, scripted

pytestmark = pytest.mark.anyio
STEADY: list[Step] = [0.002, "b"]
BODY = {"prompt": "Once", "stream": True}


def objects(text: str) -> list[Any]:
    """The data of each event, read as the standard says; the last one must be [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    *data, done = [block.removeprefix("data: ") for block in blocks]
    assert done == "[DONE]"
    return [json.loads(d) for d in data]


def texts(text: str) -> list[str]:
    return [o["choices"][0]["text"] for o in objects(text)]


@given(st.text() | st.sampled_from(["\u2028", "\x85", "\r\n\n", "\ud800", "data: [DONE]"]))
def test_an_event_is_one_line_whatever_a_reader_takes_for_the_end_of_one(text: str) -> None:
    sent = event({"text": text}).decode()
    head, *rest = sent.splitlines()
    assert rest == [""]
    assert json.loads(head.removeprefix("data: ")) == {"text": text}


def test_an_event_may_have_a_name() -> None:
    assert event({"a": 1}, "ping") == b'event: ping\ndata: {"a":1}\n\n'


def test_events_may_have_a_head_in_common() -> None:
    assert events_with({"a": 1, "b": "x"})({"c": [2]}) == event({"a": 1, "b": "x", "c": [2]})


async def test_what_is_ready_together_is_one_event(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    astream, _ = scripted("a", "b", "c", 0.05, "d", "e")
    monkeypatch.setattr(model, "astream", astream)
    response = await client.post("/v1/completions", json=BODY)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert texts(response.text) == ["abc", "de"]
    assert [o["choices"][0]["finish_reason"] for o in objects(response.text)] == [None, "stop"]


async def test_silence_is_filled_with_comments(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(model, "astream", scripted(0.1, "a", 0.1, "b")[0])
    sent = (await client.post("/v1/completions", json=BODY)).text
    comments = [block for block in sent.split("\n\n") if block.startswith(":")]
    assert len(comments) >= 4
    assert texts(sent) == ["a", "b"]


async def test_an_error_in_the_middle_is_the_last_object(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    astream, made = scripted("a", 0.01, DeviceError("the logits after 5 tokens are not finite in float16"))
    monkeypatch.setattr(model, "astream", astream)
    response = await client.post("/v1/completions", json=BODY)
    assert response.status_code == 200
    first, error = objects(response.text)
    assert first["choices"][0]["text"] == "a"
    message = "the logits after 5 tokens are not finite in float16"
    assert error == {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    assert made[0].closed
    assert log()[-1]["message"] == message
    assert log()[-1]["finish"] == "abort"


async def test_an_unforeseen_error_says_nothing_of_its_own_words(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(model, "astream", scripted("a", ValueError("somebody's secret"))[0])
    response = await client.post("/v1/completions", json=BODY)
    assert objects(response.text)[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert any("somebody's secret" in line.get("traceback", "") for line in log())


async def test_the_same_error_without_a_stream_is_a_status(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    astream, made = scripted("a", DeviceError("broken"))
    monkeypatch.setattr(model, "astream", astream)
    response = await client.post("/v1/completions", json={**BODY, "stream": False})
    assert (response.status_code, response.json()["error"]["message"]) == (500, "broken")
    assert made[0].closed


@pytest.mark.parametrize("stream", [True, False])
async def test_too_many_requests_are_a_status_before_the_stream(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def astream(*_: Any, **__: Any) -> Any:
        raise BusyError("8 requests are waiting already")

    monkeypatch.setattr(model, "astream", astream)
    response = await client.post("/v1/completions", json={**BODY, "stream": stream})
    assert (response.status_code, response.json()["error"]["message"]) == (429, "8 requests are waiting already")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [True, False])
async def test_no_token_in_time_is_an_error(
    client: httpx.AsyncClient, service: Service, model: Model, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(service, "limits", Limits(waiting_seconds=0.05))
    astream, made = scripted(5.0, "a")
    monkeypatch.setattr(model, "astream", astream)
    response = await client.post("/v1/completions", json={**BODY, "stream": stream})
    error = objects(response.text)[0]["error"] if stream else response.json()["error"]
    assert error["message"] == "no token came within 0.05 seconds: too much is going on"
    assert response.status_code == (200 if stream else 503)
    assert made[0].closed


def test_a_client_that_leaves_ends_the_generation(url: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    astream, made = scripted("a", *STEADY * 5000)
    monkeypatch.setattr(model, "astream", astream)
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY) as response:
        assert next(response.iter_lines()).startswith("data: ")
    eventually(lambda: made[0].closed, 1)


def test_a_client_that_leaves_before_the_answer_ends_the_generation(
    url: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    astream, made = scripted(30.0, "a")
    monkeypatch.setattr(model, "astream", astream)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={**BODY, "stream": False}, timeout=0.2)
    eventually(lambda: made[0].closed, 1)


async def test_a_stream_is_closed_where_nothing_of_it_could_be_sent() -> None:
    closed = []

    async def events() -> AsyncIterator[bytes]:
        yield DONE

    async def close() -> None:
        closed.append(True)

    async def send(_: Any) -> None:
        raise OSError("gone")

    async def receive() -> Any:
        await asyncio.sleep(10)

    with pytest.raises(OSError, match="gone"):
        await EventStream(events(), close)({"type": "http"}, receive, send)
    assert closed == [True]


async def test_a_slow_reader_gets_what_came_meanwhile_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is not held up: a sender that waits finds the deltas that came since, joined."""
    monkeypatch.setattr(model, "astream", scripted("a", *STEADY * 20)[0])
    service = Service(["m"], model)
    parts: list[bytes] = []

    async def send(message: Any) -> None:
        await asyncio.sleep(0.1)
        parts.append(message.get("body", b""))

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}

    headers = [(b"content-type", b"application/json")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    scope["state"] = {"meter": service.metrics.request(), "id": "1"}
    response = await ENDPOINTS[0].handler(service, Request(scope, receive))
    await response(scope, receive, send)
    got = texts(b"".join(parts).decode())
    assert "".join(got) == "a" + "b" * 20
    assert len(got) <= 3


def test_pages_are_free_when_the_client_has_left(url: str, model: Model) -> None:
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "n": 2, "stream": True}
    left = False
    for _ in range(5):  # on a busy machine the texts may have ended when the first line is read
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
            left = left or model.engine.stats.running == 2
        eventually(lambda: model.engine.stats.running == 0, 1)
    assert left


@given(st.text())
def test_events_of_a_text_are_as_if_written_whole(text: str) -> None:
    write = events_with({"id": "a", "model": '"text"'})
    write_text = text_events(write, lambda text: {"choices": [{"text": text}], "usage": None})
    assert write_text(text) == write({"choices": [{"text": text}], "usage": None})
