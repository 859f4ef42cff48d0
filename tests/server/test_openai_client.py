"""OpenAI's own client against the server on a real socket: what it sends is understood, what it expects is there."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import BaseModel

from tests.server.live import Live

CHAT: list[Any] = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": "Once upon a time"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_models(client: OpenAI, live: Live) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (live.name, "model")
    assert client.models.retrieve(live.name).id == live.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")


def test_a_chat(client: OpenAI, live: Live) -> None:
    wanted = live.model.chat(CHAT, temperature=0, max_tokens=12)
    done = client.chat.completions.create(model=live.name, messages=CHAT, max_tokens=12, temperature=0)
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", wanted.text, "length")
    assert done.object == "chat.completion"
    assert done.id.startswith("chatcmpl-")
    assert done.model == live.name
    assert done.usage is not None
    prompt = len(wanted.prompt_tokens)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (
        prompt,
        12,
        prompt + 12,
    )


def test_a_stream_is_the_same_text(client: OpenAI, live: Live) -> None:
    wanted = live.model.chat(CHAT, max_tokens=12, temperature=0.9, seed=5).text
    chunks = list(
        client.chat.completions.create(
            model=live.name,
            messages=CHAT,
            max_completion_tokens=12,
            temperature=0.9,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *texts, last = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in texts[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == wanted
    assert [chunk.choices[0].finish_reason for chunk in texts][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in texts[:-1])
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("path", "form", "more"),
    [
        ("chat/completions", ChatCompletion, {"messages": CHAT, "logprobs": True, "top_logprobs": 2}),
        ("chat/completions", ChatCompletion, {"messages": CHAT, "tools": [WEATHER], "tool_choice": "required"}),
        ("chat/completions", ChatCompletionChunk, {"messages": CHAT, "logprobs": True, "stream": True}),
        ("completions", Completion, {"prompt": "Once", "logprobs": 2, "n": 2}),
        ("responses", Response, {"input": "Hi", "max_output_tokens": 8}),
    ],
)
def test_every_field_has_the_type_that_the_client_declares(live: Live, path: str, form: Any, more: Any) -> None:
    """The client itself takes whatever comes."""
    most = {} if path == "responses" else {"max_tokens": 8}
    answer = httpx.post(
        f"{live.url}/v1/{path}", json={"model": live.name, "temperature": 0, **most, **more}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] or [answer.text]
    for line in lines:
        assert form.model_validate(json.loads(line), strict=False)


def test_without_the_option_a_stream_has_no_usage(client: OpenAI, live: Live) -> None:
    chunks = client.chat.completions.create(model=live.name, messages=CHAT, max_tokens=2, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_several_choices(client: OpenAI, live: Live) -> None:
    wanted = [c.text for c in live.model.chat(CHAT, n=3, max_tokens=8, temperature=1.0, seed=7)]
    how: Any = dict(model=live.name, messages=CHAT, n=3, max_tokens=8, temperature=1.0, seed=7)
    done = client.chat.completions.create(**how)
    assert [choice.message.content for choice in sorted(done.choices, key=lambda c: c.index)] == wanted
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**how, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == wanted


def test_stop_strings_are_not_part_of_the_text(client: OpenAI, live: Live) -> None:
    whole = live.model.chat(CHAT, temperature=0, max_tokens=20).text
    stop = whole[7:10]
    done = client.chat.completions.create(
        model=live.name, messages=CHAT, max_tokens=20, temperature=0, stop=[stop, "@@@"]
    )
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client: OpenAI, live: Live, stream: bool) -> None:
    wanted = live.model.chat(CHAT, temperature=0, max_tokens=6, logprobs=3)
    how: Any = dict(model=live.name, messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3)
    text, tokens = "", list[Any]()
    if stream:
        for chunk in client.chat.completions.create(**how, stream=True):
            for part in chunk.choices:
                text += part.delta.content or ""
                tokens += (part.logprobs and part.logprobs.content) or []
    else:
        choice = client.chat.completions.create(**how).choices[0]
        assert choice.logprobs is not None
        text, tokens = choice.message.content or "", choice.logprobs.content or []
    assert text == wanted.text
    assert wanted.logprobs is not None
    assert [token.logprob for token in tokens] == pytest.approx([t.logprob for t in wanted.logprobs], abs=1e-5)
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == wanted.text
    for token, expected in zip(tokens, wanted.logprobs, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([p for _, p in expected.top], abs=1e-5)
        assert token.top_logprobs[0].token == token.token  # greedy


PROMPTS: list[Any] = ["Once upon a time", ["Once upon", "The dog"], [1, 42, 7], [[1, 42, 7], [5, 6]]]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_every_form_of_prompt(client: OpenAI, live: Live, prompt: Any, stream: bool) -> None:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    wanted = [live.model.generate(p, temperature=0, max_tokens=6).text for p in (prompt if several else [prompt])]
    how: Any = dict(model=live.name, prompt=prompt, temperature=0, max_tokens=6)
    if stream:
        texts = [""] * len(wanted)
        for chunk in client.completions.create(**how, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        done = client.completions.create(**how)
        assert (done.object, done.id[:5]) == ("text_completion", "cmpl-")
        texts = [choice.text for choice in sorted(done.choices, key=lambda c: c.index)]
    assert texts == wanted


def test_a_completion_has_sixteen_tokens_unless_told_otherwise(client: OpenAI, live: Live) -> None:
    done = client.completions.create(model=live.name, prompt="Once", extra_body={"ignore_eos": True})
    assert done.usage is not None
    assert done.usage.completion_tokens == 16


def test_log_probabilities_of_a_completion(client: OpenAI, live: Live) -> None:
    done = client.completions.create(
        model=live.name, prompt="The dog", max_tokens=5, temperature=0, logprobs=2, echo=True
    ).choices[0]
    found = done.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.text_offset is not None
    assert found.top_logprobs is not None
    assert done.text == "The dog" + live.model.generate("The dog", temperature=0, max_tokens=5).text
    assert "".join(found.tokens[-5:]) == done.text[len("The dog") :]
    assert found.token_logprobs[0] is None  # nothing comes before the first
    assert all(p is not None and p <= 0 for p in found.token_logprobs[1:])
    assert all(b >= a for a, b in pairwise(found.text_offset))
    assert all(
        done.text[offset:].startswith(t) for t, offset in list(zip(found.tokens, found.text_offset, strict=True))[-5:]
    )
    assert all(len(top) >= 2 for top in found.top_logprobs[1:])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called(client: OpenAI, live: Live, choice: Any, stream: bool) -> None:
    how: Any = dict(
        model=live.name, messages=CHAT, tools=[WEATHER], tool_choice=choice, max_tokens=80, temperature=0,
        parallel_tool_calls=False,
    )  # fmt: skip
    if stream:
        name, arguments, reasons, ids = "", "", [], []
        for chunk in client.chat.completions.create(**how, stream=True):
            for part in chunk.choices:
                reasons.append(part.finish_reason)
                assert not part.delta.content
                for call in part.delta.tool_calls or []:
                    assert call.index == 0
                    ids += [call.id] if call.id else []
                    assert call.function is not None
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
        assert len(ids) == 1
        reason = reasons[-1]
    else:
        done = client.chat.completions.create(**how).choices[0]
        (whole,) = done.message.tool_calls or []
        assert whole.type == "function"
        assert whole.id
        name, arguments, reason = whole.function.name, whole.function.arguments, done.finish_reason
        assert not done.message.content
    assert name == "weather"
    found = json.loads(arguments)
    assert found.keys() == {"city", "days"}
    assert found["city"] in ("Paris", "Oslo")
    assert 1 <= found["days"] <= 9
    # OpenAI says "stop" where the client chose the function, and "tool_calls" where the model did.
    assert reason in ("tool_calls", "stop")


def test_tools_that_may_not_be_called_are_text(client: OpenAI, live: Live) -> None:
    done = client.chat.completions.create(
        model=live.name, messages=CHAT, tools=[WEATHER, TIME], tool_choice="none", max_tokens=8, temperature=0
    )
    assert done.choices[0].message.tool_calls is None
    assert done.choices[0].message.content


def test_the_result_of_a_tool_is_read(client: OpenAI, live: Live) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "half past ten"},
    ]
    wanted = live.model.chat(messages, tools=[TIME], temperature=0, max_tokens=6).text
    done = client.chat.completions.create(model=live.name, messages=messages, tools=[TIME], max_tokens=6, temperature=0)
    assert done.choices[0].message.content == wanted


class Animal(BaseModel):
    name: str
    legs: int


def test_an_object_of_a_class(client: OpenAI, live: Live) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "legs": {"type": "integer", "minimum": 2, "maximum": 8}},
        "required": ["colour", "legs"],
        "additionalProperties": False,
    }
    done = client.chat.completions.create(
        model=live.name, messages=CHAT, max_tokens=60, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}},
    )  # fmt: skip
    found = json.loads(done.choices[0].message.content or "")
    assert found["colour"] in ("red", "blue")
    assert 2 <= found["legs"] <= 8
    assert done.choices[0].finish_reason == "stop"


def test_parse_sends_a_schema_that_is_understood(client: OpenAI, live: Live) -> None:
    try:
        parsed = client.chat.completions.parse(
            model=live.name, messages=CHAT, max_tokens=60, temperature=0, response_format=Animal
        )
    except openai.LengthFinishReasonError:  # the model may write a name without an end
        return
    assert isinstance(parsed.choices[0].message.parsed, Animal)


def test_any_json_object(client: OpenAI, live: Live) -> None:
    done = client.chat.completions.create(
        model=live.name, messages=CHAT, max_tokens=24, temperature=0, response_format={"type": "json_object"}
    )
    assert (done.choices[0].message.content or "").lstrip().startswith("{")


def test_many_at_once_are_each_as_alone(live: Live) -> None:
    prompts = [f"{i} little dogs" for i in range(8)]
    wanted = [
        live.model.generate(prompt, max_tokens=10, temperature=0.8, seed=i).text for i, prompt in enumerate(prompts)
    ]

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

            async def one(i: int) -> str:
                how: Any = dict(model=live.name, prompt=prompts[i], max_tokens=10, temperature=0.8, seed=i)
                if i % 2:
                    return str((await client.completions.create(**how)).choices[0].text)
                stream = await client.completions.create(**how, stream=True)
                return "".join([c.text async for chunk in stream for c in chunk.choices])

            return list(await asyncio.gather(*map(one, range(len(prompts)))))

    assert asyncio.run(ask()) == wanted


def test_a_stream_that_is_left_frees_its_pages(client: OpenAI, live: Live) -> None:
    stream = client.completions.create(
        model=live.name, prompt="Once", max_tokens=800, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert live.model.engine.stats.pages_used > 0
    stream.close()
    live.wait_idle(2.0)


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -1}, "temperature"),
    ({"top_p": 3}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"abc": 1}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),  # without logprobs
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"response_format": {"type": "sound"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),  # without tools
]


@pytest.mark.parametrize(("wrong", "param"), BAD, ids=lambda v: json.dumps(v))
def test_what_is_wrong_is_named(client: OpenAI, live: Live, wrong: dict[str, Any], param: str | None) -> None:
    how: Any = {"model": live.name, "messages": CHAT, "max_tokens": 4, **wrong}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**how)
    assert caught.value.type == "invalid_request_error"
    assert param is not None
    assert (caught.value.param or "").split(".")[0].split("[")[0] == param, caught.value.body
    assert param in caught.value.message


def test_a_prompt_that_is_too_long(client: OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=live.name, prompt=[5] * (live.model.context + 1))
    assert caught.value.code == "context_length_exceeded"


def test_a_busy_server_is_asked_again(live: Live) -> None:
    """The client waits as long as Retry-After says, and then is served."""
    with live.busy(refusals=1) as refused, OpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=30) as client:
        done = client.completions.create(model=live.name, prompt="Once", max_tokens=3, temperature=0)
    assert refused() == 1
    assert done.choices[0].text == live.model.generate("Once", temperature=0, max_tokens=3).text


def test_a_busy_server_says_so(live: Live, client: OpenAI) -> None:
    with live.busy(refusals=1), pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=live.name, prompt="Once", max_tokens=3)
    assert caught.value.response.headers["retry-after"].isdigit()
    assert caught.value.code == "rate_limit_exceeded"


def test_extras_that_clients_send(client: OpenAI, live: Live) -> None:
    options: Any = dict(top_k=20, min_p=0.05, repetition_penalty=1.1, min_tokens=4)
    wanted = live.model.generate("The cat", max_tokens=8, temperature=0.9, seed=3, **options)
    done = client.completions.create(
        model=live.name, prompt="The cat", max_tokens=8, temperature=0.9, seed=3, extra_body=options
    )
    assert done.choices[0].text == wanted.text


def test_a_bias_forbids_tokens(client: OpenAI, live: Live) -> None:
    first = live.model.generate("The dog", temperature=0, max_tokens=1).tokens[0]
    done = client.completions.create(
        model=live.name, prompt="The dog", max_tokens=1, temperature=0, logprobs=5, logit_bias={str(first): -100}
    )
    assert done.choices[0].text != live.model.decode([first])
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert all(p is not None and math.isfinite(p) for p in logprobs.token_logprobs or [])
