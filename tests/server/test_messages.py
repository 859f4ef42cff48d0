"""/v1/messages: what becomes the prompt, the blocks of an answer, its events, and errors in Anthropic's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cuplama.errors import DeviceError
from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.service import Service
from tests.server.running import in_thread
from tests.server.stand_ins import scripted
from tests.server.test_chat import CALL
from tests.server.test_chat import thinker as thinker
from tests.server.test_responses import THOUGHT, events_of, prompt_of

pytestmark = pytest.mark.anyio
USER = {"role": "user", "content": "Hi"}
WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture
async def ask(thinker: Model) -> Any:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(Service(["thinker"], thinker))), base_url="http://test"
    ) as client:

        async def post(*messages: Any, status: int = 200, path: str = "", **body: Any) -> Any:
            body = {"messages": list(messages) or [USER], "max_tokens": 50, "temperature": 0, **body}
            response = await client.post(f"/v1/messages{path}", json={k: v for k, v in body.items() if v is not None})
            assert response.status_code == status, response.text
            return events_of(response.text) if body.get("stream") and status == 200 else response.json()

        yield post


async def test_the_answer_is_what_the_model_says(ask: Any, thinker: Model) -> None:
    answer = await ask(max_tokens=5, thinking={"type": "disabled"})
    whole = thinker.chat([USER], max_tokens=5, temperature=0, enable_thinking=False)
    assert answer["content"] == [{"type": "text", "text": whole.text.lstrip(), "citations": None}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "thinker")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == len(whole.prompt_tokens)
    assert answer["usage"]["output_tokens"] == 5
    count = await ask(path="/count_tokens", max_tokens=None, thinking={"type": "disabled"})
    assert count == {"input_tokens": len(whole.prompt_tokens)}


async def test_blocks_of_every_kind(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    astream, made = scripted(*THOUGHT, *CALL)
    monkeypatch.setattr(thinker, "astream", astream)
    answer = await ask(tools=[WEATHER])
    thinking, text, call = answer["content"]
    assert thinking == {"type": "thinking", "thinking": "So 1 < 2.", "signature": ""}
    assert text["text"] == "I look."
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    assert answer["stop_reason"] == "tool_use"
    assert '"parameters": {"type": "object"' in prompt_of(thinker, made)


async def test_events_build_the_message(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinker, "astream", scripted(*THOUGHT, *CALL)[0])
    events = await ask(tools=[WEATHER], stream=True)
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len(THOUGHT) + len(CALL)
    names = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}
    texts = ["So 1 < 2.", "I look.", '{"city": "Oslo"}']
    for index, wanted in enumerate(texts):
        own = [event for event in events if event.get("index") == index]
        assert [own[0]["type"], own[-1]["type"]] == ["content_block_start", "content_block_stop"]
        deltas = [event["delta"] for event in own[1:-1]]
        found = "".join(delta[names[delta["type"]]] for delta in deltas if delta["type"] in names)
        assert found == wanted


async def test_why_it_ends(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinker, "astream", scripted("</think>", "Yes")[0])
    monkeypatch.setattr(thinker, "decode", thinker.decode)
    assert (await ask())["stop_reason"] == "end_turn"
    monkeypatch.undo()
    silent = {"type": "disabled"}
    whole = thinker.chat([USER], max_tokens=20, temperature=0, enable_thinking=False).text
    word = whole.split()[3]
    answer = await ask(stop_sequences=["never there", word], thinking=silent, max_tokens=20)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", word)
    assert answer["content"][0]["text"] == whole[: whole.index(word)].lstrip()


async def test_arguments_that_are_cut_off(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinker, "astream", scripted("</think>", *CALL[:2], ': "Os')[0])
    answer = await ask(tools=[WEATHER])
    assert answer["content"][0]["input"] == {"INVALID_JSON": '{"city": "Os'}


async def test_blocks_become_messages(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    apply_chat = thinker.tokenizer.apply_chat

    def spy(messages: Any, **options: Any) -> list[int]:
        read.append((messages, options.get("continue_final_message")))
        return apply_chat(messages, **options)

    monkeypatch.setattr(thinker, "astream", scripted("Yes")[0])
    monkeypatch.setattr(thinker.tokenizer, "apply_chat", spy)
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "warm"}]}
    await ask(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "Go on"}]},
        {"role": "assistant", "content": "It is"},
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        tools=[WEATHER],
    )
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert read[0][0] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look", "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "warm", "name": "weather"},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "It is"},
    ]
    assert read[0][1] is True


async def test_a_choice_is_held_by_a_grammar(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    astream, made = scripted(*CALL)
    monkeypatch.setattr(thinker, "astream", astream)
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        await ask(tools=[WEATHER], tool_choice=choice)
        assert "weather" in str(made[-1].params.grammar)
    await ask(tools=[WEATHER], tool_choice={"type": "none"})
    assert "weather" not in prompt_of(thinker, made)
    await ask(output_format={"type": "json_schema", "schema": {"type": "object"}})
    assert made[-1].params.json_schema == {"type": "object"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0][0] is of type"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content = 5"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0] is of type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "no name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "x"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "there are no tools"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"output_format": {"type": "xml"}}, "output_format"),
    ({"stop_sequence": ["x"]}, "did you mean stop_sequences?"),
]


@pytest.mark.parametrize(("body", "said"), REFUSED, ids=[str(case[0])[:50] for case in REFUSED])
async def test_what_is_refused(ask: Any, body: dict[str, Any], said: str) -> None:
    answer = await ask(status=400, **body)
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert said in answer["error"]["message"]


async def test_errors_of_every_status(thinker: Model) -> None:
    service = Service(["thinker"], thinker, keys=["secret"])
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"messages": [USER], "max_tokens": 1, "model": "other"}
        response = await client.post("/v1/messages", json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        response = await client.post("/v1/messages", json=body, headers={"x-api-key": "secret"})
        assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
        service.draining = True
        response = await client.post("/v1/messages", json={**body, "model": ""}, headers={"x-api-key": "secret"})
        assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")


async def test_an_error_in_the_middle_of_a_stream(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinker, "astream", scripted("</think>a", DeviceError("broken"))[0])
    events = await ask(stream=True)
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "broken"}}


@pytest.fixture
def base_url(thinker: Model) -> Iterator[str]:
    with in_thread(Service(["thinker"], thinker)) as address:
        yield address


def test_anthropics_client(base_url: str, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
    monkeypatch.setattr(thinker, "astream", scripted(*THOUGHT, *CALL)[0])
    client = anthropic.Anthropic(base_url=base_url, api_key="x")
    asked: dict[str, Any] = {"model": "thinker", "max_tokens": 50, "messages": [USER], "tools": [WEATHER]}
    message = client.messages.create(**asked)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[-1].input == {"city": "Oslo"}
    monkeypatch.setattr(thinker, "astream", scripted(*THOUGHT, *CALL)[0])
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "I look."
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[-1].input == {"city": "Oslo"}
    assert json.loads(final.model_dump_json())["stop_reason"] == "tool_use"
    with pytest.raises(anthropic.BadRequestError, match="tools\\[0\\]"):
        client.messages.create(**{**asked, "tools": [{"type": "web_search_20250305", "name": "w"}]})
    assert client.messages.count_tokens(model="thinker", messages=[USER]).input_tokens > 0
