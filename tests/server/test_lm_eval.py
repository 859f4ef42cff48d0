"""The requests of lm-evaluation-harness's ``local-completions``, and what it does with the answers.

It takes the sum of ``token_logprobs[context:-1]`` as the likelihood of a continuation, and compares each with the
largest of ``top_logprobs`` to see whether it is what greedy decoding gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import cuplama
from cuplama.model import Model
from tests.server.live import Live, serving

SEED = 1234


def ask(live: Live, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(live.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def exact(model: Model, ids: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities of each token after the first, from the reference's logits."""
    logits = model.logits(ids).astype(np.float64)[:-1]
    logits -= logits.max(-1, keepdims=True)
    return np.array((logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]])


@pytest.mark.parametrize("tokenized", [True, False])
def test_likelihoods(live: Live, tokenized: bool) -> None:
    pairs = [("Once upon a time there was", " a little girl"), ("The dog", " ate the moon"), ("A", " b c d e")]
    contexts = [live.model.encode(context) for context, _ in pairs]
    wholes = [live.model.encode(context + more) for context, more in pairs]
    body = {
        "model": live.name,
        "prompt": wholes if tokenized else [context + more for context, more in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": SEED,
        "echo": True,
    }
    choices = sorted(ask(live, "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(pairs)
    for choice, context, ids in zip(choices, contexts, wholes, strict=True):
        found, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(found) == len(tops) == len(ids) + 1
        assert found[0] is None
        wanted = exact(live.model, ids)
        assert found[1:-1] == pytest.approx(wanted, abs=1e-4)
        assert sum(found[len(context) : -1]) == pytest.approx(wanted[len(context) - 1 :].sum(), abs=1e-3)
        best = live.model.logits(ids).argmax(-1)
        for i in range(1, len(ids)):  # equal to the last bit, as it is compared with !=
            assert (found[i] == max(tops[i].values())) == (best[i - 1] == ids[i])


def test_what_greedy_decoding_gives_is_greedy(live: Live) -> None:
    ids = live.model.encode("Once upon a time")
    ids += live.model.generate(ids, temperature=0, max_tokens=10, ignore_eos=True).tokens
    body = {"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": SEED, "echo": True}
    (choice,) = ask(live, "/v1/completions", {"model": live.name, **body})["choices"]
    found, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    assert all(found[i] == max(tops[i].values()) for i in range(len(ids) - 10, len(ids)))


def test_a_prompt_as_long_as_the_context_allows(model_folder: Path) -> None:
    """Rolling likelihoods send windows of max_length - 1 tokens, and one token more is generated."""
    ids = [int(i) for i in np.random.default_rng(0).integers(1, 4000, 199)]
    body = {"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    with cuplama.load(model_folder, device="numpy", context=200) as model, serving(model) as live:
        (choice,) = ask(live, "/v1/completions", {"model": live.name, **body})["choices"]
        assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(exact(model, ids), abs=2e-4)


def test_texts_until_a_stop(live: Live) -> None:
    prompts = [live.model.encode("Once upon a time"), live.model.encode("The cat sat")]
    body = {
        "model": live.name,
        "prompt": prompts,
        "max_tokens": 24,
        "temperature": 0,
        "stop": [".", "<|endoftext|>"],
        "seed": SEED,
    }
    texts = {choice["index"]: choice["text"] for choice in ask(live, "/v1/completions", body)["choices"]}
    for i, prompt in enumerate(prompts):
        assert texts[i] == live.model.generate(prompt, temperature=0, max_tokens=24, stop=[".", "<|endoftext|>"]).text


def test_the_tokenizer_of_the_server(live: Live) -> None:
    info = httpx.get(live.url + "/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>"
    assert isinstance(info["chat_template"], str)
    words = "Once upon a time, in Zürich 🙂"
    tokens = ask(live, "/tokenize", {"prompt": words, "add_special_tokens": False})["tokens"]
    assert tokens == live.model.tokenizer.encode(words, bos=False)
    assert ask(live, "/detokenize", {"tokens": tokens})["prompt"] == words
    assert ask(live, "/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})["tokens"] == [
        *live.model.stop_ids
    ]
