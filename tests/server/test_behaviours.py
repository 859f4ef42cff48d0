"""What users of other servers count on: llama.cpp's public tests by behaviour, and the extras of vLLM's clients."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cuplama.model import Model
from tests.server.live import Live, serving

CHAT = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book?"}]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def complete(client: httpx.Client, prompt: Any = "Once upon a time", **more: Any) -> dict[str, Any]:
    """The first choice of a completion."""
    body = {"model": "stories-7m", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def chat(client: httpx.Client, **more: Any) -> dict[str, Any]:
    """The first choice of a chat."""
    body = {"model": "stories-7m", "messages": CHAT, "max_tokens": 8, "temperature": 0, **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """All objects of a stream, which must end as streams end."""
    with client.stream("POST", path, json={"model": "stories-7m", "stream": True, **body}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_one_seed_gives_one_text_and_others_give_others(client: httpx.Client) -> None:
    texts = [complete(client, temperature=1.0, seed=seed, max_tokens=10)["text"] for seed in (42, 42, 42, 1, 2, 3)]
    assert len(set(texts[:3])) == 1
    assert len(set(texts[2:])) == 4


def test_without_a_seed_texts_differ(client: httpx.Client) -> None:
    assert len({complete(client, temperature=1.2, max_tokens=10)["text"] for _ in range(3)}) > 1


def test_the_first_event_has_the_role_and_the_last_the_reason(client: httpx.Client) -> None:
    found = events(client, "/v1/chat/completions", messages=CHAT, max_tokens=6, temperature=0)
    choices = [event["choices"][0] for event in found]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] or choice["delta"]["role"] is None for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len({event["id"] for event in found}) == len({event["created"] for event in found}) == 1
    assert {event["object"] for event in found} == {"chat.completion.chunk"}


def test_usage_in_every_event(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(client, "/v1/completions", prompt="Once", max_tokens=5, temperature=0, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert all(event["usage"]["prompt_tokens"] == found[0]["usage"]["prompt_tokens"] > 0 for event in found)


def test_a_stop_string_never_shows_in_a_stream(client: httpx.Client) -> None:
    """Also where it comes in several tokens: its beginning is held back."""
    whole = complete(client, max_tokens=60)["text"]
    start = whole.index(" ", 30)
    stop = whole[start : start + 12]
    found = events(client, "/v1/completions", prompt="Once upon a time", max_tokens=60, temperature=0, stop=stop)
    pieces = [event["choices"][0]["text"] for event in found]
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_is_held_back_comes_at_the_end(client: httpx.Client) -> None:
    """The text ends with what could have begun a stop string."""
    whole = complete(client, max_tokens=10)["text"]
    found = events(
        client, "/v1/completions", prompt="Once upon a time", max_tokens=10, temperature=0, stop=whole[-4:] + "@"
    )
    assert "".join(event["choices"][0]["text"] for event in found) == whole


def test_characters_of_several_tokens_come_whole(client: httpx.Client, live: Live) -> None:
    ids = live.model.tokenizer.encode("🙂é漢", bos=False)
    assert len(ids) > 3  # of bytes, most of which are no character
    how: dict[str, Any] = {"allowed_token_ids": ids, "temperature": 1.5, "seed": 4, "max_tokens": 30}
    whole = complete(client, **how)["text"]
    found = events(client, "/v1/completions", prompt="Once upon a time", **how)
    assert "".join(event["choices"][0]["text"] for event in found) == whole
    assert all(len(event["choices"][0]["text"].encode()) < 200 for event in found)


def test_forbidden_words_do_not_come(client: httpx.Client, live: Live) -> None:
    free = chat(client, max_tokens=24)["message"]["content"]
    words = {word for word in re.findall(r"\w+", free) if len(word) > 1}
    ids = {t for word in words for form in (word, " " + word) for t in live.model.tokenizer.encode(form, bos=False)}
    bound = chat(client, max_tokens=24, logit_bias={str(t): -100 for t in ids})["message"]["content"]
    found = set(live.model.tokenizer.encode(bound, bos=False))
    assert bound != free
    assert not found & ids or len(found & ids) < 2  # the same text may be spelt by other tokens


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"choice": ["good", "bad"]}, r"good|bad"),
        ({"regex": r"[0-9]{3}-[0-9]{2}"}, r"[0-9]{3}-[0-9]{2}"),
        ({"grammar": 'root ::= "a"{5,5}'}, r"aaaaa"),
        ({"json": {"const": "foooooo"}}, r'"foooooo"'),
        ({"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}}, r"\[[12], ?[12]\]"),
    ],
)
def test_structured_outputs(client: httpx.Client, asked: dict[str, Any], pattern: str) -> None:
    done = complete(client, structured_outputs=asked, max_tokens=40)
    assert re.fullmatch(pattern, done["text"]), done["text"]
    assert done["finish_reason"] == "stop"
    (name, value) = next(iter(asked.items()))
    assert complete(client, max_tokens=40, **{f"guided_{name}": value})["text"] == done["text"]


FORMATS = [
    ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "foooooo"}}}, r'"foooooo"'),
    ({"type": "json_object"}, r"\{.*"),
    ({"type": "text"}, r"[^{].*"),
    ({"type": "sound"}, None),
    ({"type": "json_schema"}, None),
    ({"type": "json_schema", "json_schema": {"name": "a", "schema": 123}}, None),
    ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 123}}}, None),
    ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "hiccup"}}}, None),
    ({}, None),
    ("json_object", None),
]


@pytest.mark.parametrize(("form", "pattern"), FORMATS)
def test_forms_of_answers(client: httpx.Client, form: Any, pattern: str | None) -> None:
    if pattern is not None:
        text = chat(client, response_format=form, max_tokens=12)["message"]["content"]
        assert re.match(pattern, text, re.S), text
        return
    body = {"model": "stories-7m", "messages": CHAT, "response_format": form}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in ("response_format", "json_schema")  # the latter is a part of it


def test_token_ids_of_prompt_and_text(client: httpx.Client, live: Live) -> None:
    done = complete(client, return_token_ids=True)
    assert done["prompt_token_ids"] == live.model.encode("Once upon a time")
    assert live.model.decode(done["token_ids"]) == done["text"]


def test_an_echo_without_new_tokens(client: httpx.Client) -> None:
    done = complete(client, echo=True, max_tokens=0)
    assert done["text"] == "Once upon a time"


def test_stop_tokens_of_the_request(client: httpx.Client, live: Live) -> None:
    ids = live.model.generate("Once upon a time", temperature=0, max_tokens=8).tokens
    done = complete(client, stop_token_ids=[ids[4]])
    assert done["finish_reason"] == "stop"
    assert done["text"] == live.model.decode(ids[: ids.index(ids[4])])


def test_no_end_before_the_least_number_of_tokens(client: httpx.Client, live: Live) -> None:
    eos = {str(t): 100 for t in live.model.stop_ids}
    assert complete(client, logit_bias=eos, return_token_ids=True)["token_ids"] == [*live.model.stop_ids]
    assert len(complete(client, logit_bias=eos, min_tokens=5, return_token_ids=True)["token_ids"]) == 6


def test_going_on_from_the_last_message(client: httpx.Client, live: Live) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "The best book is"}]
    wanted = live.model.chat(messages, continue_final_message=True, temperature=0, max_tokens=8).text
    more = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, **more)["message"]["content"] == wanted


def test_content_in_parts(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "the best book?"}]
    joined = [CHAT[0], {"role": "user", "content": "What is\nthe best book?"}]
    inside = chat(client, messages=[CHAT[0], {"role": "user", "content": parts}])
    assert inside["message"]["content"] == chat(client, messages=joined)["message"]["content"]


def test_log_probabilities_of_the_prompt(client: httpx.Client, live: Live) -> None:
    ids = live.model.encode("Once upon a time")
    found = complete(client, prompt_logprobs=1)["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    assert all(str(id) in entry for id, entry in zip(ids[1:], found[1:], strict=True))


def test_text_of_special_tokens(client: httpx.Client, live: Live) -> None:
    eos = {str(t): 100 for t in live.model.stop_ids}
    shown = complete(client, "A", logit_bias=eos, ignore_eos=True, max_tokens=2, skip_special_tokens=False)["text"]
    hidden = complete(client, "A", logit_bias=eos, ignore_eos=True, max_tokens=2)["text"]
    assert (shown, hidden) == ("<|endoftext|>" * 2, "")


def test_keys(model: Model) -> None:
    with serving(model, keys=("one key", "another")) as live, httpx.Client(base_url=live.url) as client:
        body = {"prompt": "Once", "max_tokens": 1}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "one key"}, 401),
            ({"Authorization": "Bearer one key"}, 200),
            ({"x-api-key": "another"}, 200),
        ):
            answer = client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == status, headers
        assert client.get("/v1/models").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200


def test_metrics_count_what_was_done(client: httpx.Client) -> None:
    def read() -> dict[str, float]:
        lines = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
        return {name.replace("cuplama:", ""): float(value) for name, value in lines}

    before = read()
    complete(client, max_tokens=7, ignore_eos=True)
    list(events(client, "/v1/completions", prompt="Once", max_tokens=5, temperature=0, ignore_eos=True))
    client.post("/v1/completions", json={"prompt": "Once", "temperature": -1})
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    label = 'model_name="stories-7m"'
    assert grown[f"generation_tokens_total{{{label}}}"] == 12
    assert grown[f"time_to_first_token_seconds_count{{{label}}}"] == 2
    # Tokens that came at once with the first one had no time between them.
    assert 2 <= grown[f"inter_token_latency_seconds_count{{{label}}}"] <= 10
    assert grown[f"e2e_request_latency_seconds_count{{{label}}}"] == 2
    assert sum(v for name, v in grown.items() if name.startswith("request_success_total") and "length" in name) == 2
    assert sum(v for name, v in grown.items() if 'status="400"' in name and name.startswith("http_requests_total")) == 1
