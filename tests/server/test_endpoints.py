"""The small endpoints: health in every state, tokens, metrics, version."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

import cuplama
from cuplama.errors import DeviceError
from cuplama.model import Model
from cuplama.server.service import Service

pytestmark = pytest.mark.anyio
LOADING = {"message": "Loading model", "type": "unavailable_error", "param": None, "code": 503}


async def test_health_says_what_is_the_matter(
    client: httpx.AsyncClient, service: Service, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/health", "/v1/health", "/ping"):
        response = await client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert service.ready
    service.draining = True
    assert (await client.get("/health")).json()["error"]["message"] == "the server is shutting down"
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 503
    service.draining = False
    monkeypatch.setattr(model.engine, "failure", DeviceError("the GPU is gone"))
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the engine failed: the GPU is gone"
    assert not service.ready
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200  # a request may still go well


async def test_while_the_model_is_loaded(client: httpx.AsyncClient, service: Service) -> None:
    service.model = None
    response = await client.get("/health")
    assert (response.status_code, response.json()) == (503, {"error": LOADING})
    assert response.headers["retry-after"] == "1"
    assert (await client.post("/tokenize", json={"prompt": "a"})).json() == {"error": LOADING}
    assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
    assert b"cuplama:num_requests_running{" in (await client.get("/metrics")).content


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": cuplama.__version__}


async def test_tokens_as_clients_of_vllm_ask_for_them(client: httpx.AsyncClient, model: Model) -> None:
    ids = model.tokenizer.encode("Once upon", bos=False)
    answer = (await client.post("/tokenize", json={"model": "stories-7m", "prompt": "Once upon"})).json()
    assert answer == {"count": len(ids) + 1, "max_model_len": 1024, "tokens": [0, *ids], "token_strs": None}
    asked = {"prompt": "Once upon", "add_special_tokens": False, "return_token_strs": True}
    answer = (await client.post("/tokenize", json=asked)).json()
    assert (answer["tokens"], answer["token_strs"]) == (ids, [model.tokenizer.piece(id) for id in ids])
    back = (await client.post("/detokenize", json={"tokens": [0, *ids]})).json()
    assert back["prompt"] == back["content"] == model.decode([0, *ids], skip_special=False)


async def test_tokens_of_a_chat(client: httpx.AsyncClient, model: Model) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = (await client.post("/tokenize", json={"messages": messages})).json()
    assert answer["tokens"] == model.encode_chat(messages)
    asked = {"messages": messages, "add_generation_prompt": False}
    answer = (await client.post("/tokenize", json=asked)).json()
    assert model.decode(answer["tokens"]) == "user: Hi\n"
    asked = {"messages": messages, "continue_final_message": True}
    answer = (await client.post("/tokenize", json=asked)).json()
    assert model.decode(answer["tokens"]) == "user: Hi"


async def test_tokens_as_clients_of_llama_cpp_ask_for_them(client: httpx.AsyncClient, model: Model) -> None:
    ids = model.tokenizer.encode("Once", bos=False)
    assert (await client.post("/tokenize", json={"content": "Once"})).json() == {"tokens": ids}
    answer = (await client.post("/tokenize", json={"content": "Once", "add_special": True})).json()
    assert answer == {"tokens": [0, *ids]}
    answer = (await client.post("/tokenize", json={"content": "Once", "with_pieces": True})).json()
    assert answer == {"tokens": [{"id": id, "piece": model.tokenizer.token_text(id)} for id in ids]}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/tokenize", {}, 400, "exactly one of prompt, messages, content must be given"),
        ("/tokenize", {"prompt": "a", "content": "b"}, 400, "exactly one of prompt, messages, content must be given"),
        ("/tokenize", {"prompt": 3}, 400, "prompt = 3 is a number; it must be a string"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens = 1 is a number; it must be"),
        ("/tokenize", {"prompt": "a", "model": "b"}, 404, "the model 'b' is not served here; served: stories-7m"),
        ("/tokenize", {"messages": "Hi"}, 400, "messages"),
        ("/tokenize", {"messages": [], "chat_template_kwargs": 3}, 400, "messages = [] is out of range"),
        ("/tokenize", {"content": "a", "parse_special": False}, 400, "parse_special = false is not supported"),
        ("/detokenize", {}, 400, "tokens is missing"),
        ("/tokenize", {"messages": [{}], "chat_template_kwargs": 3}, 400, "chat_template_kwargs = 3 is a number"),
        ("/tokenize", {"prompt": "a", "add_special_token": 1}, 400, "did you mean add_special_tokens?"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens = [-1] is out of range"),
        ("/detokenize", {"tokens": "abc"}, 400, 'tokens = "abc" is a string; it must be a list of token ids'),
        ("/detokenize", {"tokens": [1, None]}, 400, "tokens = [1, null]: null is null; it must be a list of token ids"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


async def test_half_a_surrogate_pair_is_no_text(client: httpx.AsyncClient) -> None:
    content, json = b'{"prompt": "\\ud800"}', {"Content-Type": "application/json"}
    response = await client.post("/tokenize", content=content, headers=json)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the text is not valid Unicode")


async def test_the_tokenizer_is_described(client: httpx.AsyncClient, model: Model) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info["eos_token"] == info["bos_token"] == model.tokenizer.piece(0)
    assert (info["eos_token_id"], info["vocab_size"], info["model_max_length"]) == (0, 4096, 1024)
    assert info["chat_template"].startswith("{% for m in messages %}")


async def test_prometheus_reads_what_the_engine_and_the_frame_count(client: httpx.AsyncClient, model: Model) -> None:
    await client.get("/version")
    response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = dict(re.findall(r"^([^#]\S*) (\S+)$", response.text, re.M))
    tokens = values['cuplama:generation_tokens_total{model_name="stories-7m"}']
    assert float(tokens) == model.engine.stats.generated_tokens
    assert values['cuplama:num_requests_running{model_name="stories-7m"}'] == "0.0"
    label = 'method="GET",model_name="stories-7m",path="/version",status="200"'
    assert values[f"cuplama:http_requests_total{{{label}}}"] == "1.0"
