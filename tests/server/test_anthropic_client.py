"""What clients of Anthropic's messages send, and the events that they wait for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.live import Live

HELLO = [{"role": "user", "content": "Say hello"}]
TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    headers = {"anthropic-version": "2023-06-01", "x-api-key": "none"}
    with httpx.Client(base_url=live.url, timeout=60, headers=headers) as client:
        yield client


def ask(client: httpx.Client, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    body = {"model": "stories-7m", "max_tokens": 12, "temperature": 0, "messages": messages, **more}
    answer = client.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The data of all events of a stream; the name of each must be its type."""
    body = {"model": "stories-7m", "max_tokens": 12, "temperature": 0, "stream": True, "messages": HELLO, **body}
    with client.stream("POST", "/v1/messages", json=body) as stream:
        assert stream.status_code == 200
        lines = [line for line in stream.iter_lines() if line and not line.startswith(":")]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    found = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in found]
    return [event for event in found if event["type"] != "ping"]


def test_a_message(client: httpx.Client, live: Live) -> None:
    found = ask(client, HELLO)
    wanted = live.model.chat(HELLO, temperature=0, max_tokens=12)
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    (block,) = found["content"]
    assert (block["type"], block["text"]) == ("text", wanted.text)
    assert found["usage"]["input_tokens"] + found["usage"].get("cache_read_input_tokens", 0) == len(
        wanted.prompt_tokens
    )
    assert found["usage"]["output_tokens"] == 12


def test_the_system_is_a_message(client: httpx.Client, live: Live) -> None:
    wanted = live.model.chat([{"role": "system", "content": "Be kind."}, *HELLO], temperature=0, max_tokens=12).text
    assert ask(client, HELLO, system="Be kind.")["content"][0]["text"] == wanted
    assert ask(client, HELLO, system=[{"type": "text", "text": "Be kind."}])["content"][0]["text"] == wanted


def test_the_events_of_a_stream(client: httpx.Client) -> None:
    found = events(client)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    start = found[0]["message"]
    assert (start["role"], start["content"], start["stop_reason"]) == ("assistant", [], None)
    assert start["usage"]["input_tokens"] > 0
    assert (found[1]["content_block"]["type"], found[1]["content_block"]["text"]) == ("text", "")
    assert all(event["delta"]["type"] == "text_delta" for event in found[2:-3])
    text = "".join(event["delta"]["text"] for event in found[2:-3])
    assert text == ask(client, HELLO)["content"][0]["text"]
    assert found[-2]["delta"]["stop_reason"] == "max_tokens"
    assert found[-2]["usage"]["output_tokens"] == 12


def test_stop_sequences_are_named(client: httpx.Client) -> None:
    whole = ask(client, HELLO, max_tokens=24)["content"][0]["text"]
    stop = whole[8:12]
    found = ask(client, HELLO, max_tokens=24, stop_sequences=["@@@", stop])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert found["content"][0]["text"] == whole[: whole.index(stop)]


def test_tokens_are_counted(client: httpx.Client, live: Live) -> None:
    answer = client.post("/v1/messages/count_tokens", json={"model": "stories-7m", "messages": HELLO})
    assert answer.json() == {"input_tokens": len(live.model.encode_chat(HELLO))}


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]
)
def test_a_tool_that_must_be_used(client: httpx.Client, choice: dict[str, Any]) -> None:
    found = ask(client, HELLO, tools=[TOOL], tool_choice=choice, max_tokens=60)
    (block,) = found["content"]
    assert (found["stop_reason"], block["type"], block["name"]) == ("tool_use", "tool_use", "weather")
    assert block["input"]["city"] in ("Paris", "Oslo")
    streamed = events(client, tools=[TOOL], tool_choice=choice, max_tokens=60)
    parts = [e["delta"]["partial_json"] for e in streamed if e.get("delta", {}).get("type") == "input_json_delta"]
    assert json.loads("".join(parts)) == block["input"]


def test_results_of_tools_are_read(client: httpx.Client) -> None:
    messages: list[dict[str, Any]] = [
        *HELLO,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "Sunny, 25°C", "is_error": False},
                {"type": "text", "text": "What should I wear?"},
            ],
        },
    ]
    assert ask(client, messages, tools=[TOOL])["content"][0]["type"] == "text"


@pytest.mark.parametrize(
    "wrong", [{"messages": []}, {"messages": "Hi"}, {"max_tokens": -1}, {"max_tokens": None}, {"temperature": -1}]
)
def test_errors_have_anthropics_form(client: httpx.Client, wrong: dict[str, Any]) -> None:
    answer = client.post("/v1/messages", json={"model": "stories-7m", "max_tokens": 4, "messages": HELLO, **wrong})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["message"]
