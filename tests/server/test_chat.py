"""/v1/chat/completions: messages, the forms of an answer, log-probabilities, tools, reasoning, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import cuplama
from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.chat_request import read_chat_request
from cuplama.server.service import Service
from tests.server.conftest import CHAT_TEMPLATE
from tests.server.stand_ins import ScriptedStream, Step, log_softmax, scripted
from tests.server.test_sse import objects

pytestmark = pytest.mark.anyio
USER = {"role": "user", "content": "Tell me a story"}
# It prints the tools, opens the reasoning unless told not to, and says in which form the model calls tools.
THINKING_TEMPLATE = """\
{% for t in tools or [] %}<tools>{{ t | tojson }}</tools>{# <tool_call> #}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ "(" ~ m.reasoning_content ~ ") " if m.reasoning_content }}\
{{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% if enable_thinking is not defined or enable_thinking %}
<think>
{% else %}<think></think>{% endif %}{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL: list[Step] = ['<tool_call>\n{"name": "wea', 'ther", "arguments": {"city"', ': "Oslo"}}\n</tool', "_call>"]


@pytest.fixture(scope="module")
def thinker(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The bundled model with a template of a model that thinks and calls tools."""
    folder = tmp_path_factory.mktemp("thinker")
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    with cuplama.load(folder, device="numpy") as model:
        yield model


@pytest.fixture
async def thinking(thinker: Model) -> Any:
    transport = httpx.ASGITransport(create_app(Service(["thinker"], thinker)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def post(client: httpx.AsyncClient, *messages: Any, **body: Any) -> Any:
    body = {"temperature": 0, "messages": list(messages) or [USER], **body}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return objects(response.text) if body.get("stream") else response.json()


async def refused(client: httpx.AsyncClient, *messages: Any, **body: Any) -> tuple[str | None, str]:
    response = await client.post("/v1/chat/completions", json={"messages": list(messages) or [USER], **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


async def test_the_answer_is_what_the_model_says(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, max_tokens=5)
    text = model.chat([USER], max_tokens=5, temperature=0).text
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": text, "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["prompt_tokens"] == len(model.encode_chat([USER]))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_without_a_limit_the_context_is_one(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, {"role": "user", "content": "Once " * 500}, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == model.context
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_chat_that_is_too_long_is_refused(client: httpx.AsyncClient) -> None:
    said = {"role": "user", "content": "Once " * 1000}
    response = await client.post("/v1/chat/completions", json={"messages": [said]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["message"] == "the prompt has 2009 tokens; the context has room for 1023"


async def test_text_parts_and_developers_are_read(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "Be kind"}, {"type": "text", "text": "Be short"}]
    said = {"role": "user", "content": "Hi", "name": None}
    as_parts = await post(client, {"role": "developer", "content": parts}, said, max_tokens=1, return_token_ids=True)
    plain = {"role": "system", "content": "Be kind\nBe short"}
    as_text = await post(client, plain, said, max_tokens=1, return_token_ids=True)
    assert as_parts["prompt_token_ids"] == as_text["prompt_token_ids"]


async def test_a_template_that_knows_developers_gets_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(template: str) -> list[int]:
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        return read_chat_request(model, [{"role": "developer", "content": "x"}], {}).ids

    for template, role in ((CHAT_TEMPLATE, "system"), (CHAT_TEMPLATE + "{# developer #}", "developer")):
        assert model.decode(ids(template)).startswith(f"{role}: x")


async def test_reasoning_that_comes_back_reaches_the_template(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, Any] = {
        "role": "assistant",
        "content": "Yes",
        "reasoning": "Hm",
        "refusal": None,
        "annotations": [],
    }
    made = script(thinker, monkeypatch, "No")
    await post(thinking, USER, before, USER)
    assert "assistant: (Hm) Yes\n" in thinker.decode(made[0].prompts[0])


async def test_choices_have_seeds_of_their_own(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, n=3, seed=7, temperature=1, max_tokens=6)
    wanted = model.chat([USER], n=3, seed=7, temperature=1.0, max_tokens=6)
    assert [c["message"]["content"] for c in answer["choices"]] == [c.text for c in wanted]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]


async def test_an_answer_can_go_on_from_the_last_message(client: httpx.AsyncClient, model: Model) -> None:
    begun = {"role": "assistant", "content": "Once upon a"}
    answer = await post(client, USER, begun, max_tokens=3, continue_final_message=True, add_generation_prompt=False)
    wanted = model.chat([USER, begun], continue_final_message=True, max_tokens=3, temperature=0)
    assert answer["choices"][0]["message"]["content"] == wanted.text


async def test_log_probabilities_are_those_of_the_logits(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, max_tokens=4, logprobs=True, top_logprobs=2, return_token_ids=True)
    choice = answer["choices"][0]
    content, ids = choice["logprobs"]["content"], choice["token_ids"]
    rows = log_softmax(model.logits([*answer["prompt_token_ids"], *ids]))[-5:-1]
    assert [c["logprob"] for c in content] == pytest.approx([r[i] for r, i in zip(rows, ids, strict=True)], abs=1e-4)
    assert "".join(c["token"] for c in content) == choice["message"]["content"]
    assert bytes(b for c in content for b in c["bytes"]).decode() == choice["message"]["content"]
    for row, entry in zip(rows, content, strict=True):
        best = (-row).argsort()[:2]
        assert [t["token"] for t in entry["top_logprobs"]] == [model.tokenizer.token_text(int(i)) for i in best]
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(row[best], abs=1e-4)


async def test_a_stop_token_is_no_content(client: httpx.AsyncClient, model: Model) -> None:
    free = await post(client, max_tokens=3, return_token_ids=True)
    *_, last = free["choices"][0]["token_ids"]
    answer = await post(client, max_tokens=9, stop_token_ids=[last], logprobs=True, return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"][-1] == last
    assert [c["token"] for c in choice["logprobs"]["content"]] == [
        model.tokenizer.token_text(id) for id in choice["token_ids"][:-1]
    ]


async def test_parts_of_characters_have_bytes_and_no_text_of_their_own(client: httpx.AsyncClient, model: Model) -> None:
    ids = model.tokenizer.encode("€", bos=False)
    assert len(ids) == 3
    answer = await post(client, max_tokens=1, logprobs=True, allowed_token_ids=[ids[0]])
    [entry] = answer["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("\\xe2", [0xE2])


async def test_log_probabilities_of_the_prompt(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await post(client, max_tokens=1, prompt_logprobs=0)
    streamed = await post(client, max_tokens=1, prompt_logprobs=0, stream=True)
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert whole["prompt_logprobs"][0] is None
    assert streamed[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert all("prompt_logprobs" not in event for event in streamed[1:])


async def test_the_pieces_of_a_stream_are_the_whole(client: httpx.AsyncClient) -> None:
    body = dict(n=2, seed=3, temperature=1, max_tokens=6, logprobs=True, top_logprobs=1, return_token_ids=True)
    whole = await post(client, **body)
    events = await post(client, **body, stream=True, stream_options={"include_usage": True})
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in whole["choices"]:
        pieces = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in p["delta"] for p in pieces[1:])
        assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        assert pieces[-1]["delta"] == {}
        assert [id for p in pieces for id in p.get("token_ids", [])] == choice["token_ids"]
        given = [entry for p in pieces if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert given == choice["logprobs"]["content"]


def script(model: Model, monkeypatch: pytest.MonkeyPatch, *steps: Step) -> list[ScriptedStream]:
    """Make the model say the steps, one after the other, whatever it is asked."""
    apart: list[Step] = [part for step in steps for part in (step, 0.002)]
    astream, made = scripted(*apart)
    monkeypatch.setattr(model, "astream", astream)
    return made


async def test_reasoning_is_set_apart_from_the_content(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(thinker, monkeypatch, "Let me", " see", "</think>", "\n\nYes")
    answer = await post(thinking)
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == (
        "Yes",
        "Let me see",
        "Let me see",
    )
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    script(thinker, monkeypatch, "Let me", " see", "</think>", "\n\nYes")
    events = await post(thinking, stream=True)
    deltas = [e["choices"][0]["delta"] for e in events]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "Let me see"
    assert "".join(d.get("content", "") for d in deltas) == "Yes"
    script(thinker, monkeypatch, "Let me", " see", "</think>", "\n\nYes")
    message = (await post(thinking, include_reasoning=False))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes", "refusal": None}


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True)])
async def test_the_effort_switches_reasoning(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch, effort: str, thinks: bool
) -> None:
    made = script(thinker, monkeypatch, "Yes")
    message = (await post(thinking, reasoning_effort=effort))["choices"][0]["message"]
    assert ("reasoning" in message) == thinks
    assert thinker.decode(made[0].prompts[0]).rstrip().endswith("<think>" if thinks else "</think>")
    await post(thinking, reasoning_effort=effort, chat_template_kwargs={"enable_thinking": False})
    assert thinker.decode(made[-1].prompts[0]).endswith("</think>")


@pytest.mark.parametrize("choice", [None, "auto"])
async def test_calls_of_tools_are_set_apart(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch, choice: str | None
) -> None:
    made = script(thinker, monkeypatch, "Hm</think>", *CALL)
    answer = (await post(thinking, tools=[WEATHER], tool_choice=choice))["choices"][0]
    assert '"name": "weather"' in thinker.decode(made[0].prompts[0])
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [call] = answer["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


async def test_calls_of_tools_come_in_pieces(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(thinker, monkeypatch, "Hm</think>So:\n", *CALL)
    events = await post(thinking, tools=[WEATHER], stream=True)
    choices = [e["choices"][0] for e in events]
    calls = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
    assert "".join(c["delta"].get("content", "") for c in choices) == "So:"
    first, *rest = calls
    assert first["id"]
    assert {**first, "id": ""} == {
        "index": 0,
        "id": "",
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert all(set(c) == {"index", "function"} and set(c["function"]) == {"arguments"} for c in rest)
    assert len(rest) > 1
    assert json.loads("".join(c["function"]["arguments"] for c in rest)) == {"city": "Oslo"}
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_without_tools_nothing_is_a_call(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        made = script(thinker, monkeypatch, "</think>", *CALL)
        answer = (await post(thinking, **more))["choices"][0]
        assert answer["message"]["content"] == "".join(map(str, CALL))
        assert answer["finish_reason"] == "stop"
        assert "weather" not in thinker.decode(made[0].prompts[0])


async def test_a_single_call_can_be_asked_for(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parallel, calls in ((True, 2), (False, 1)):
        script(thinker, monkeypatch, "</think>", *CALL, "\n", *CALL)
        answer = await post(thinking, tools=[WEATHER], parallel_tool_calls=parallel)
        assert len(answer["choices"][0]["message"]["tool_calls"]) == calls


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_must_come_is_held_to_a_grammar(
    thinking: httpx.AsyncClient, thinker: Model, monkeypatch: pytest.MonkeyPatch, choice: Any
) -> None:
    made = script(thinker, monkeypatch, "</think>", *CALL)
    answer = await post(thinking, tools=[WEATHER], tool_choice=choice)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert "weather" in str(made[0].params.grammar)


REFUSED: list[tuple[list[Any], dict[str, Any], str | None, str]] = [
    ([], {"top_logprobs": 1}, "top_logprobs", "top_logprobs = 1 needs logprobs = true"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        {},
        "messages",
        "messages[0]['content'][0] is of type 'image_url'; the model reads text, so only 'text' is allowed",
    ),
    ([USER, {"content": "x"}], {}, "messages", "messages[1] has no 'role'"),
    (
        [],
        {"reasoning_effort": "high"},
        "reasoning_effort",
        'reasoning_effort = "high" is not supported: the model\'s chat template reads nothing like it',
    ),
    (
        [],
        {"chat_template_kwargs": {"mood": 1}},
        "chat_template_kwargs",
        "chat_template_kwargs: mood is not a variable of the chat template (the template reads: add_generation_prompt)",
    ),
    ([], {"chat_template": "rag"}, None, "the model has no chat template named 'rag' (only default)"),
    ([], {"tool_choice": "required"}, "tool_choice", "tool_choice asks for a call, and there are no tools"),
    (
        [],
        {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
        "tool_choice asks for a call; that excludes another form of the text",
    ),
    ([], {"echo": True}, "echo", "echo = true is not supported; use continue_final_message"),
    ([], {"modalities": ["audio"]}, "modalities", 'modalities = ["audio"] is not supported; the model writes text'),
]


@pytest.mark.parametrize(("messages", "body", "param", "message"), REFUSED, ids=range(len(REFUSED)))
async def test_what_cannot_be_is_refused(
    client: httpx.AsyncClient, messages: list[Any], body: dict[str, Any], param: str | None, message: str
) -> None:
    assert await refused(client, *messages, **body) == (param, message)


async def test_what_asks_for_nothing_is_taken(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = dict(
        response_format={"type": "text"}, reasoning_effort="none", tools=[], tool_choice="none", functions=[],
        modalities=["text"], store=False, metadata={"a": "b"}, user="me", service_tier="auto", logit_bias={}, stop=[],
        stream_options=None, echo=False, best_of=1, priority=3,
    )  # fmt: skip
    assert (await post(client, **body, max_tokens=1))["usage"]["completion_tokens"] == 1


async def test_a_call_that_must_come_comes(client: httpx.AsyncClient) -> None:
    """Of a model that has never heard of tools; its form is then Llama's."""
    parameters = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "count", "parameters": parameters}}
    answer = await post(client, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=60)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "count"
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2)


async def test_an_answer_can_be_an_object(client: httpx.AsyncClient) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = await post(client, response_format=form, max_tokens=40)
    assert json.loads(answer["choices"][0]["message"]["content"])["yes"] in (True, False)
