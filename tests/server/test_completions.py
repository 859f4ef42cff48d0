"""/v1/completions: the forms of prompts, echo, log-probabilities as lm-eval reads them, choices, streams, usage."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from cuplama.model import Model
from cuplama.server.service import Service
from tests.server.stand_ins import log_softmax
from tests.server.test_sse import objects

pytestmark = pytest.mark.anyio
PROMPT = "Once upon a time"


async def post(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client: httpx.AsyncClient, **body: Any) -> tuple[int, str | None, str]:
    headers = {"content-type": "application/json"}  # httpx would refuse to write half a character
    response = await client.post("/v1/completions", content=json.dumps(body), headers=headers)
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


async def stream(client: httpx.AsyncClient, **body: Any) -> list[Any]:
    response = await client.post("/v1/completions", json={"temperature": 0, "stream": True, **body})
    assert response.status_code == 200, response.text
    return objects(response.text)


async def test_a_completion_is_what_the_model_generates(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, prompt=PROMPT, max_tokens=5)
    text = model.generate(PROMPT, max_tokens=5, temperature=0).text
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "stories-7m"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    counted = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert {name: answer["usage"][name] for name in counted} == counted
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_sixteen_tokens_are_the_default(client: httpx.AsyncClient) -> None:
    assert (await post(client, prompt=PROMPT))["usage"]["completion_tokens"] == 16
    assert (await post(client, prompt=PROMPT, max_tokens=None))["usage"]["completion_tokens"] == 16


async def test_every_form_of_a_prompt_is_read(client: httpx.AsyncClient, model: Model) -> None:
    a, b = (model.encode(text) for text in (PROMPT, "Two cats"))
    of_texts = await post(client, prompt=[PROMPT, "Two cats"], max_tokens=4)
    of_ids = await post(client, prompt=[a, b], max_tokens=4)
    assert of_texts["choices"] == of_ids["choices"]
    assert [c["index"] for c in of_ids["choices"]] == [0, 1]
    alone = [await post(client, prompt=ids, max_tokens=4) for ids in (a, b)]
    assert [answer["choices"][0]["text"] for answer in alone] == [c["text"] for c in of_ids["choices"]]
    assert of_ids["usage"]["prompt_tokens"] == len(a) + len(b)


async def test_an_empty_prompt_is_the_bos_token(client: httpx.AsyncClient) -> None:
    prompts: list[Any] = ["", [[]]]
    answers = [await post(client, prompt=prompt, max_tokens=3, return_token_ids=True) for prompt in prompts]
    assert [a["choices"][0]["prompt_token_ids"] for a in answers] == [[0], [0]]


async def test_bos_can_be_left_out(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, prompt=PROMPT, add_special_tokens=False, max_tokens=1, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == model.tokenizer.encode(PROMPT, bos=False)
    assert len(answer["choices"][0]["token_ids"]) == 1


async def test_choices_of_a_prompt_have_seeds_of_their_own(client: httpx.AsyncClient, model: Model) -> None:
    answer = await post(client, prompt=[PROMPT, "Two"], n=2, seed=3, temperature=1, max_tokens=6)
    wanted = model.generate([PROMPT, "Two"], n=2, seed=3, temperature=1.0, max_tokens=6)
    assert [c["text"] for c in answer["choices"]] == [c.text for c in wanted]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    prompts = len(model.encode(PROMPT)) + len(model.encode("Two"))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (prompts, 24)


async def test_the_models_own_defaults_count_where_the_request_says_nothing(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    own = model.astream

    def astream(prompts: Any, params: Any, **options: Any) -> Any:
        seen.append(params)
        return own(prompts, params, **options)

    monkeypatch.setattr(model, "astream", astream)
    for defaults in (model.defaults, {}):
        monkeypatch.setattr(model, "defaults", defaults)
        await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert [(p.temperature, p.top_p) for p in seen] == [(0.8, 0.95), (1.0, 1.0)]


async def test_echo_returns_the_prompt_before_the_text(client: httpx.AsyncClient, model: Model) -> None:
    text = model.generate(PROMPT, max_tokens=3, temperature=0).text
    prompts: list[Any] = [PROMPT, model.encode(PROMPT)]
    for prompt in prompts:
        assert (await post(client, prompt=prompt, echo=True, max_tokens=3))["choices"][0]["text"] == PROMPT + text
        assert (await post(client, prompt=prompt, echo=True, max_tokens=0))["choices"][0]["text"] == PROMPT


async def test_log_probabilities_are_those_of_the_logits(client: httpx.AsyncClient, model: Model) -> None:
    answer = (await post(client, prompt=PROMPT, max_tokens=4, logprobs=3, return_token_ids=True))["choices"][0]
    given, ids = answer["logprobs"], answer["token_ids"]
    prompt = model.encode(PROMPT)
    rows = log_softmax(model.logits([*prompt, *ids]))[len(prompt) - 1 : -1]
    assert given["tokens"] == [model.tokenizer.token_text(id) for id in ids]
    assert "".join(given["tokens"]) == answer["text"]
    assert given["token_logprobs"] == pytest.approx([row[id] for row, id in zip(rows, ids, strict=True)], abs=1e-4)
    for row, best in zip(rows, given["top_logprobs"], strict=True):
        ids = np.argsort(-row)[:3]
        assert best == pytest.approx({model.tokenizer.token_text(int(i)): row[i] for i in ids}, abs=1e-4)
    assert given["text_offset"] == [0, *np.cumsum([len(t) for t in given["tokens"]])[:-1]]


async def test_a_drawn_token_stands_among_the_best_ones(client: httpx.AsyncClient) -> None:
    answer = await post(client, prompt=PROMPT, max_tokens=8, logprobs=1, temperature=5, seed=1)
    given = answer["choices"][0]["logprobs"]
    for token, logprob, best in zip(given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True):
        assert best[token] == logprob
        assert max(best.values()) >= logprob
    assert any(len(best) == 2 for best in given["top_logprobs"])  # one that was not the best


async def test_log_probabilities_of_lm_eval_are_those_of_the_logits(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ``local-completions`` reads the sum of token_logprobs[ctxlen:-1], and whether each is the best there."""
    contexts = ["Once upon a", "The dog was", "She said"]
    ends = [" time, there was", " very happy", " xylophone"]
    pairs = [(model.encode(a), model.tokenizer.encode(b, bos=False)) for a, b in zip(contexts, ends, strict=True)]
    body = {"model": "stories-7m", "prompt": [a + b for a, b in pairs], "max_tokens": 1, "logprobs": 1, "seed": 1234}
    answer = await post(client, **body, echo=True)
    for choice, (context, end) in zip(answer["choices"], pairs, strict=True):
        scores = log_softmax(model.logits(context + end))
        rows = scores[len(context) - 1 : -1]
        wanted = math.fsum(row[id] for row, id in zip(rows, end, strict=True))
        given = choice["logprobs"]
        part = given["token_logprobs"][len(context) : -1]
        assert math.fsum(part) == pytest.approx(wanted, abs=1e-5)
        best = [max(top.values()) for top in given["top_logprobs"][len(context) : -1]]
        greedy = all(a == b for a, b in zip(part, best, strict=True))
        assert greedy == (rows.argmax(axis=1).tolist() == end)
        assert given["token_logprobs"][0] is given["top_logprobs"][0] is None
        assert len(given["tokens"]) == len(context) + len(end) + 1


async def test_echo_with_log_probabilities_and_nothing_generated(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for streamed in (False, True):
        body = dict(prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
        choice = (
            (await stream(client, **body))[0]["choices"][0] if streamed else (await post(client, **body))["choices"][0]
        )
        assert choice["text"] == PROMPT
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == ["<|endoftext|>", "Once", " upon", " a", " time"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 4, 9, 11]  # BOS is no part of the text
        ids = model.encode(PROMPT)
        wanted = log_softmax(model.logits(ids))[range(4), ids[1:]]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-5)


async def test_log_probabilities_of_the_prompt_in_vllms_form(
    client: httpx.AsyncClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = (await post(client, prompt="Once upon", max_tokens=1, prompt_logprobs=1))["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert choice["logprobs"] is None
    ids = model.encode("Once upon")
    for row, id, entry in zip(log_softmax(model.logits(ids)), ids[1:], rest, strict=False):
        best = int(row.argmax())
        assert entry[str(best)] == {
            "logprob": pytest.approx(row[best]),
            "rank": 1,
            "decoded_token": model.tokenizer.token_text(best),
        }
        assert entry[str(id)]["logprob"] == pytest.approx(row[id])


async def test_tokens_can_be_written_as_ids(client: httpx.AsyncClient) -> None:
    body = dict(prompt=PROMPT, max_tokens=2, logprobs=0, return_tokens_as_token_ids=True, return_token_ids=True)
    choice = (await post(client, **body))["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{id}" for id in choice["token_ids"]]


async def test_the_pieces_of_a_stream_are_the_whole(client: httpx.AsyncClient) -> None:
    body = dict(
        prompt=[PROMPT, "Two"], n=2, seed=5, temperature=1, max_tokens=7, logprobs=1, echo=True, return_token_ids=True
    )
    whole = await post(client, **body)
    events = await stream(client, **body, stream_options={"include_usage": True})
    assert {e["id"] for e in events} == {events[0]["id"]}
    assert all(e["usage"] is None for e in events[:-1])
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        pieces = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(p["text"] for p in pieces) == choice["text"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        assert pieces[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert [id for p in pieces for id in p["token_ids"]] == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            assert [v for p in pieces for v in p["logprobs"][name]] == values


async def test_usage_can_come_with_every_event(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(client, prompt=PROMPT, max_tokens=3, stream_options=options)
    assert [e["usage"]["total_tokens"] for e in events][-2:] == [8, 8]
    assert all("usage" not in e for e in await stream(client, prompt=PROMPT, max_tokens=3))


async def test_stop_strings_and_tokens_end_the_text(client: httpx.AsyncClient, model: Model) -> None:
    choice = (await post(client, prompt=PROMPT, max_tokens=20, stop=" was"))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (", there", "stop")
    [comma] = model.tokenizer.encode(",", bos=False)
    choice = (await post(client, prompt=PROMPT, max_tokens=20, stop_token_ids=[comma]))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


async def test_special_tokens_are_shown_where_asked(client: httpx.AsyncClient, model: Model) -> None:
    body = dict(prompt="Hi", max_tokens=2, ignore_eos=True, allowed_token_ids=[0])
    assert (await post(client, **body))["choices"][0]["text"] == ""
    shown = (await post(client, **body, skip_special_tokens=False, logprobs=0))["choices"][0]
    assert shown["text"] == "<|endoftext|>" * 2
    assert shown["logprobs"]["text_offset"] == [0, 13]


async def test_nothing_but_allowed_tokens_is_drawn(client: httpx.AsyncClient) -> None:
    body = dict(prompt=PROMPT, max_tokens=8, temperature=2, seed=1, return_token_ids=True)
    answer = await post(client, **body, allowed_token_ids=[300, 301, 302], logit_bias={"301": -1e30})
    assert set(answer["choices"][0]["token_ids"]) == {300, 302}


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"best_of": 3, "n": 2}, 400, "best_of", "best_of = 3 is not supported; it must be n = 2"),
    ({"n": 129}, 400, "n", "n = 129 is out of range; at most 128 are allowed"),
    ({"stop": ["x"] * 17}, 400, "stop", "stop has 17 stop strings; at most 16 are allowed"),
    ({"prompt": ["x"] * 1025}, 400, "prompt", "prompt has 1025 prompts; at most 1024 are allowed"),
    ({"prompt": [5000]}, 400, None, "token id 5000 is out of range; the vocabulary has 4096 tokens"),
    ({"prompt": ["x", "\ud800"]}, 400, None, "prompt 1: the text is not valid Unicode: '\\ud800' at character 0"),
    ({"user": ["\ud800"]}, 400, "user", 'user = ["\\ud800"] is a list; it must be a string'),
    (
        {"tool\ud800": 1, "max_token\ud800s": 1},
        400,
        "max_token\\ud800s",
        '"max_token\\ud800s" is no field of this request; did you mean max_tokens?',
    ),
    ({"prompt": [[7], [7] * 1024]}, 400, None, "prompt 1: the prompt has 1024 tokens; the context has room for 1023"),
    (
        {"logit_bias": {"4096": 1}},
        400,
        "logit_bias",
        "logit_bias: token id 4096 is out of range; the vocabulary has 4096",
    ),
    (
        {"allowed_token_ids": [4096]},
        400,
        "allowed_token_ids",
        "allowed_token_ids: token id 4096 is out of range; the vocabulary has 4096",
    ),
    ({"max_tokens": 3, "min_tokens": 4}, 400, "max_tokens", "max_tokens = 3 is less than min_tokens = 4"),
    ({"model": "gpt-4"}, 404, "model", "the model 'gpt-4' is not served here; served: stories-7m"),
]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
async def test_what_cannot_be_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    assert await refused(client, **{"prompt": "x", **body}) == (status, param, message)


@pytest.mark.parametrize("name", ["", None, "stories-7m"])
async def test_the_model_may_go_without_a_name(client: httpx.AsyncClient, name: str | None) -> None:
    assert (await post(client, prompt="x", max_tokens=1, model=name))["model"] == "stories-7m"


async def test_a_prompt_may_be_limited(
    client: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "limits", replace(service.limits, prompt_tokens=4))
    assert await refused(client, prompt=PROMPT) == (400, None, "the prompt has 5 tokens; at most 4 are allowed")


async def test_unknown_fields_are_in_the_log(client: httpx.AsyncClient, log: Any) -> None:
    await post(client, prompt="x", max_tokens=1, chat_id=7)
    assert log()[-1]["ignored_fields"] == ["chat_id"]


async def test_requests_at_once_give_what_each_gives_alone(client: httpx.AsyncClient, model: Model) -> None:
    bodies: list[dict[str, Any]] = [
        dict(prompt=f"{word} {i}", seed=i, temperature=1, max_tokens=4 + i)
        for i, word in enumerate(["Once", "Two cats", "She said", "The dog"] * 3)
    ]

    async def ask(i: int, body: dict[str, Any]) -> str:
        if i % 2:
            return "".join(e["choices"][0]["text"] for e in await stream(client, **body))
        return str((await post(client, **body))["choices"][0]["text"])

    found = await asyncio.gather(*(ask(i, body) for i, body in enumerate(bodies)))
    defaults = {"top_p": 0.95, "top_k": 0}
    assert found == [model.generate(**{**defaults, **body}).text for body in bodies]


async def test_the_text_can_be_held_to_a_form(client: httpx.AsyncClient) -> None:
    body = dict(prompt=PROMPT, max_tokens=40, temperature=1, seed=1)
    choice = (await post(client, **body, structured_outputs={"choice": ["a cat", 'a "dog"']}))["choices"][0]
    assert choice["text"] in ("a cat", 'a "dog"')
    assert choice["finish_reason"] == "stop"
    assert (await post(client, **body, guided_regex="[0-9]{3}"))["choices"][0]["text"].isdigit()
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert json.loads((await post(client, **body, response_format=form))["choices"][0]["text"])["n"] in (1, 2)
    assert json.loads((await post(client, **body, json_schema=schema))["choices"][0]["text"])["n"] in (1, 2)


async def test_a_form_that_cannot_be_is_refused(client: httpx.AsyncClient) -> None:
    param, message = (await refused(client, prompt="x", guided_regex="("))[1:]
    assert message.startswith("regex = '('")
    assert param == "regex"
