"""/v1/responses: what becomes the prompt, the items of an answer, its events, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cuplama.errors import DeviceError
from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.endpoints.responses import FIELDS
from cuplama.server.service import Service
from tests.server.running import in_thread
from tests.server.stand_ins import Step, scripted
from tests.server.test_chat import CALL
from tests.server.test_chat import thinker as thinker

pytestmark = pytest.mark.anyio
USER = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
THOUGHT: list[Step] = ["So 1", " < 2.", "</think>\n\n", "I", " look."]


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of a stream's events, each of which has its type as its name."""
    found = []
    for part in text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@pytest.fixture
async def ask(thinker: Model) -> Any:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(Service(["thinker"], thinker))), base_url="http://test"
    ) as client:

        async def post(given: Any = "Hi", status: int = 200, **body: Any) -> Any:
            response = await client.post("/v1/responses", json={"input": given, "temperature": 0, **body})
            assert response.status_code == status, response.text
            return events_of(response.text) if body.get("stream") and status == 200 else response.json()

        yield post


def prompt_of(thinker: Model, made: list[Any]) -> str:
    return thinker.decode(made[-1].prompts[0], skip_special=False)


async def test_the_answer_is_what_the_model_says(ask: Any, thinker: Model) -> None:
    response = await ask(max_output_tokens=5)
    text = thinker.chat([USER], max_tokens=5, temperature=0).text
    assert (response["object"], response["status"], response["model"]) == ("response", "incomplete", "thinker")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    [item] = response["output"]
    assert item["type"] == "reasoning"  # the template has begun it
    assert item["status"] == "incomplete"
    assert item["content"][0]["text"].strip() == text.strip()
    assert response["usage"]["output_tokens"] == 5
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 5}
    assert response["usage"]["input_tokens"] == len(thinker.encode_chat([USER]))
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + 5


async def test_items_of_every_kind(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    astream, made = scripted(*THOUGHT, *CALL, *CALL)
    monkeypatch.setattr(thinker, "astream", astream)
    response = await ask(tools=[WEATHER])
    assert response["status"] == "completed"
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", *["function_call"] * 2]
    reasoning, message, call, other = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "So 1 < 2."}]
    assert message["content"] == [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})
    assert len({item["id"] for item in response["output"]}) == 4
    assert call["call_id"] != other["call_id"]
    assert '"name": "weather"' in prompt_of(thinker, made)
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    alone = await ask(tools=[WEATHER], parallel_tool_calls=False)
    assert [item["type"] for item in alone["output"]] == ["reasoning", "message", "function_call"]


async def test_events_build_the_response(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinker, "astream", scripted(*THOUGHT, *CALL)[0])
    events = await ask(tools=[WEATHER], stream=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:2] == ["created", "in_progress"]
    assert names[-1] == "completed"
    for kind, item in enumerate(events[-1]["response"]["output"]):
        own = [event for event in events if event.get("output_index") == kind]
        assert own[0]["type"] == "response.output_item.added"
        assert own[-1] == {**own[-1], "type": "response.output_item.done", "item": item}
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        [done] = [event for event in own if event["type"].endswith(("text.done", "arguments.done"))]
        assert deltas == done.get("text", done.get("arguments"))
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}
    assert events[0]["response"]["output"] == []


async def test_an_error_in_the_middle_of_a_stream(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinker, "astream", scripted("</think>a", DeviceError("broken"))[0])
    events = await ask(stream=True)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "broken"}
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a"


async def test_items_become_messages(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    apply_chat = thinker.tokenizer.apply_chat

    def spy(messages: Any, **options: Any) -> list[int]:
        read.append(messages)
        return apply_chat(messages, **options)

    monkeypatch.setattr(thinker, "astream", scripted("</think>Yes")[0])
    monkeypatch.setattr(thinker.tokenizer, "apply_chat", spy)
    await ask(
        [
            {"role": "developer", "content": [{"type": "input_text", "text": "Short."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "x", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "warm"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]},
            USER,
        ],
        instructions="Be kind.",
        tools=[WEATHER],
    )
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert read[0] == [
        {"role": "system", "content": "Be kind.\n\nShort."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look", "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "warm", "name": "weather"},
        {"role": "assistant", "content": "No", "reasoning_content": "So"},
        USER,
    ]


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
    ({"conversation": "c"}, "conversation", "nothing is stored"),
    ({"background": True}, "background", "wait"),
    ({"n": 2}, "n", "several requests"),
    ({"input": 5}, "input", "a string or a list of items"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input", 'input[0] is of type "item_reference"'),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "content[0] is of type"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input", "input[0].call_id = null"),
    ({"tools": [{"type": "web_search"}]}, "tools", 'tools[0] is of type "web_search"'),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "supported: none, auto, required"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice",
        "none of the tools: weather",
    ),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"text": {"format": {"type": "xml"}}}, None, "response_format: type = 'xml'"),
    ({"inputs": "x", "input": "y"}, "inputs", "did you mean input?"),
]


@pytest.mark.parametrize(("body", "param", "said"), REFUSED, ids=[str(case[0])[:50] for case in REFUSED])
async def test_what_is_refused(ask: Any, body: dict[str, Any], param: str | None, said: str) -> None:
    given = body.get("input", "Hi")
    error = (await ask(given, status=400, **{k: v for k, v in body.items() if k != "input"}))["error"]
    assert said in error["message"]
    assert error["param"] == param or param is None


async def test_a_choice_is_held_by_a_grammar(ask: Any, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    astream, made = scripted(*CALL)
    monkeypatch.setattr(thinker, "astream", astream)
    await ask(tools=[WEATHER], tool_choice="required")
    assert "weather" in str(made[-1].params.grammar)
    await ask(tools=[WEATHER], tool_choice="auto")
    assert made[-1].params.grammar is None
    await ask(tools=[WEATHER], tool_choice="none")
    assert "weather" not in prompt_of(thinker, made)
    await ask(tools=[{**WEATHER, "strict": True}])
    assert "weather" in str(made[-1].params.grammar)
    await ask(text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}})
    assert made[-1].params.json_schema == {"type": "object"}


def test_the_schema_names_the_fields() -> None:
    assert FIELDS.schema["required"] == ["input"]
    assert {"instructions", "max_output_tokens", "tools", "temperature"} <= FIELDS.schema["properties"].keys()


@pytest.fixture
def base_url(thinker: Model) -> Iterator[str]:
    with in_thread(Service(["thinker"], thinker)) as address:
        yield address


def test_openais_client(base_url: str, thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    monkeypatch.setattr(thinker, "astream", scripted(*THOUGHT, *CALL)[0])
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="x")
    response = client.responses.create(model="thinker", input="Hi", tools=[WEATHER])
    assert response.output_text == "I look."
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    monkeypatch.setattr(thinker, "astream", scripted(*THOUGHT, *CALL)[0])
    with client.responses.stream(model="thinker", input="Hi", tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.delta", "response.completed"} <= kinds
    assert final.output_text == "I look."
    assert final.output[-1].arguments == '{"city": "Oslo"}'
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(model="thinker", input="Hi", previous_response_id="resp_1")
