"""Choices, seeds, and completions from which a run can be repeated."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama import Completion, Model, SamplingParams
from cuplama.prompts import Prompt
from tests.tiny import CHARS, load

pytestmark = pytest.mark.usefixtures("all_pages_come_back")

SAMPLED: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2}
PROMPTS = ["F", "First Citizen:", "the", "the"]


# --- Choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 11, 2**64 - 2])
def test_choices_of_one_prompt(chars: Model, seed: int | None) -> None:
    done = chars.generate("First", n=4, seed=seed, **SAMPLED)
    first = done[0].seed
    assert seed in (None, first)
    assert [c.seed for c in done] == [(first + i) % 2**64 for i in range(4)]
    assert [c.index for c in done] == [0, 1, 2, 3]
    assert len({c.text for c in done}) > 1
    for c in done:
        assert chars.generate("First", seed=c.seed, **SAMPLED).text == c.text


def test_choices_of_several_prompts(chars: Model) -> None:
    done = chars.generate(PROMPTS, n=3, seed=5, **SAMPLED)
    assert [c.prompt for c in done] == [p for p in PROMPTS for _ in range(3)]
    assert [c.seed for c in done] == [5, 6, 7] * 4
    assert [c.index for c in done] == list(range(12))
    deltas: list[list[cuplama.Delta]] = [[] for _ in done]
    with chars.stream(PROMPTS, n=3, seed=5, **SAMPLED) as stream:
        for delta in stream:
            deltas[delta.index].append(delta)
        streamed = stream.completions
    assert [c.text for c in streamed] == [c.text for c in done]
    for c, own in zip(done, deltas, strict=True):
        assert chars.generate(c.prompt, seed=c.seed, **SAMPLED).text == c.text == "".join(d.text for d in own)


def test_n_decides_between_one_and_a_list(chars: Model) -> None:
    one = chars.generate("First", max_tokens=3)
    assert isinstance(one, Completion)
    n: Any
    for n in (1, np.int64(1)):
        for prompt in ("First", ["First"]):
            done = chars.generate(prompt, max_tokens=3, n=n)
            assert [c.text for c in done] == [one.text]
    assert chars.generate([], n=3) == []


def test_prompts_of_a_batch_draw_seeds_of_their_own(chars: Model) -> None:
    done = chars.generate(["the"] * 4, **SAMPLED)
    assert len({c.seed for c in done}) == 4
    assert [c.seed for c in chars.generate(["the"] * 4, seed=3, **SAMPLED)] == [3] * 4


# --- What a completion says -----------------------------------------------------------------------


def test_what_a_completion_says(chars: Model) -> None:
    done = chars.generate("First", max_tokens=3, temperature=0.5)
    assert (done.prompt, done.prompt_tokens) == ("First", chars.encode("First"))
    assert (done.model, done.device, done.dtype, done.index) == (str(CHARS), "numpy", "float32", 0)
    assert done.params == SamplingParams(max_tokens=3, temperature=0.5, seed=done.seed)
    ids: Any = np.array([3, 4])
    given = chars.generate(ids, max_tokens=1)
    assert (given.prompt, given.prompt_tokens) == ([3, 4], [3, 4])
    assert type(given.prompt[0]) is int


def test_an_empty_prompt_is_kept_as_it_was_given(llama: Model) -> None:
    done = llama.generate([[]], max_tokens=1)[0]
    assert (done.prompt, done.prompt_tokens) == ([], [llama.bos])


def test_how_a_completion_is_shown(chars: Model) -> None:
    line_break = chars.encode("\n")[0]
    done = chars.generate("First", max_tokens=75, seed=7, logit_bias={line_break: 1.5})
    assert "\n" in done.text
    assert str(done) == f"{done}" == done.text
    assert done._repr_mimebundle_(include=None, exclude=None) == {"text/plain": done.text}
    assert repr(done) == f"<Completion {done.text[:59] + '…'!r}: 75 tokens, length, seed 7>"
    assert "\n" not in repr(done)
    one = chars.generate("First", max_tokens=1, seed=7)
    assert repr(one) == f"<Completion {one.text!r}: 1 token, length, seed 7>"


def through_json(done: Completion) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert found == done.to_dict()  # plain already: lists, and keys that are strings
    return found


RUNS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {},
    SAMPLED,
    {**SAMPLED, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {**SAMPLED, "logit_bias": {5: 3.0, 6: -math.inf}, "min_tokens": 4, "stop_token_ids": [5, 7, 8], "logprobs": 3},
    {**SAMPLED, "stop": ["e", "t "], "max_tokens": None, "seed": 2**64 - 1},
]


@pytest.mark.parametrize("run", RUNS, ids=range(len(RUNS)))
def test_any_run_can_be_repeated(chars: Model, run: dict[str, Any]) -> None:
    """From JSON alone: the model is loaded by its name, and each text comes alone as it came in the batch."""
    mixed: list[Prompt] = [[3, 4], "F"]
    done = [chars.generate("First", **run), *chars.generate(PROMPTS, **run), *chars.generate(mixed, n=2, **run)]
    for found in map(through_json, done):
        with cuplama.load(found["model"], device=found["device"], dtype=found["dtype"]) as model:
            again = model.generate(found["prompt"], SamplingParams.from_dict(found["params"]))
        assert (again.text, again.tokens) == (found["text"], found["tokens"])
        assert again.finish_reason == found["finish_reason"]
        assert {**again.to_dict(), "timings": None, "index": None, "logprobs": None} == {
            **found,
            "timings": None,
            "index": None,
            "logprobs": None,  # to rounding
        }


def test_what_the_json_holds(chars: Model) -> None:
    done = chars.generate("First", max_tokens=3, logprobs=2, logit_bias={6: -math.inf}, seed=1)
    found = through_json(done)
    assert set(found["params"]) == {*SamplingParams.__dataclass_fields__}
    assert found["params"]["logit_bias"] == {"6": "-inf"}
    assert found["params"]["seed"] == found["seed"] == 1
    assert done.logprobs is not None
    assert found["logprobs"] == [
        {"id": t.id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]} for t in done.logprobs
    ]
    assert found["timings"]["generated_tokens"] == 3
    assert found["timings"]["decode_tokens"] == 2
    assert found["timings"]["prompt_seconds"] == done.timings.prompt_seconds
    assert through_json(chars.generate("First", max_tokens=1))["logprobs"] is None
    assert set(found) == {*Completion.__dataclass_fields__}


@pytest.mark.parametrize("records", [False, True])
def test_generated_tokens_are_those_asked_for(records: bool) -> None:
    with load(CHARS, cache_tokens=640) as model:
        model.backend.captures = records
        for count in (0, 1, 2, 9):
            assert model.generate("First", max_tokens=count).timings.generated_tokens == count
        timings = model.generate(["First", "F"], max_tokens=5, n=3)[0].timings
        assert (timings.generated_tokens, timings.decode_tokens) == (2 * 3 * 5, 2 * 3 * 4)
        assert timings.prompt_tokens == 3 * (5 + 1)
        stream = model.stream("First", max_tokens=9)
        for _ in range(4):
            next(stream)
        assert stream.timings.generated_tokens == 4
        stream.close()
