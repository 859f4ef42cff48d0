"""The Python API, on models small enough for NumPy: prompts, batches, stopping, and what was drawn."""

from __future__ import annotations

import copy as copy_module
import json
import math
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama import Model, SamplingParams
from cuplama.errors import ContextError, CopyError, ParameterError, PromptError, TokenizerError
from tests.tiny import CHARS, LLAMA, copy, load

SAMPLED: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 11}


pytestmark = pytest.mark.usefixtures("all_pages_come_back")


# --- Prompts --------------------------------------------------------------------------------------


def test_every_form_of_a_prompt(chars: Model) -> None:
    ids = chars.encode("First")
    wanted = chars.generate("First", max_tokens=6)
    assert isinstance(wanted, cuplama.Completion)
    assert (len(wanted.tokens), wanted.finish_reason, wanted.logprobs) == (6, "length", None)
    assert wanted.text == chars.tokenizer.decode(wanted.tokens)
    single: Any
    for single in (ids, tuple(ids), np.array(ids), [np.int32(i) for i in ids], np.array(ids, np.uint8)):
        assert chars.generate(single, max_tokens=6).tokens == wanted.tokens
    batch: Any
    for batch in (["First"], ("First",), [ids], [np.array(ids)], np.array([ids]), ["First", ids]):
        done = chars.generate(batch, max_tokens=6)
        assert isinstance(done, list)
        assert [c.tokens for c in done] == [wanted.tokens] * len(batch)
    batch = []
    assert chars.generate(batch, max_tokens=6) == []
    assert list(chars.stream([])) == []


def test_empty_prompt_is_bos(llama: Model, tmp_path: Path) -> None:
    assert llama.bos == 1
    assert llama.generate([[]], max_tokens=4)[0].tokens == llama.generate([1], max_tokens=4).tokens
    assert np.array_equal(llama.logits([]), llama.logits([1]))
    config = json.loads((LLAMA / "config.json").read_text())
    folder = copy(LLAMA, tmp_path, config={**config, "bos_token_id": 50256})  # an id of another, larger vocabulary
    with load(folder, context=64) as model, pytest.raises(PromptError, match="no BOS"):
        model.generate([[]])


def test_logits(chars: Model) -> None:
    ids = chars.encode("First")
    wanted = chars.logits(ids)
    assert wanted.shape == (5, 65)
    assert wanted.dtype == np.float32
    form: Any
    for form in ("First", np.array(ids), tuple(ids), [np.int8(i) for i in ids]):
        assert np.array_equal(chars.logits(form), wanted)
    assert chars.logits([*range(40), *range(40)]).shape == (80, 65)
    for prompt in ([1] * 81, "x" * 81):
        with pytest.raises(ContextError, match="the prompt has 81 tokens; the context has room for 80"):
            chars.logits(prompt)


def test_decode(chars: Model, llama: Model) -> None:
    ids = chars.encode("First")
    form: Any
    for form in (ids, tuple(ids), np.array(ids)):
        assert chars.decode(form) == "First"
    assert chars.decode([]) == ""
    assert chars.decode([*ids, 64, 10**6]) == chars.tokenizer.decode([*ids, 64])
    for form in ("First", 5, None, [1.5], ["a"], [True], [[1]]):
        with pytest.raises(PromptError, match=r"^(decode takes a list of token ids, and not |a token id is a whole)"):
            chars.decode(form)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        llama.decode([5])


def test_decode_and_special_tokens() -> None:
    with cuplama.load(device="numpy") as model:
        assert model.bos is not None
        ids = [model.bos, *model.tokenizer.encode("Hi", bos=False)]
        assert model.decode(ids) == "Hi"
        assert model.decode(ids, skip_special=False) == model.decode(ids, False) == "<|endoftext|>Hi"


# --- Batches --------------------------------------------------------------------------------------

PROMPTS = ["F", "First Citizen:", "the", "To be, or not to be, that is the question:", "the"]
VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 20},
    SAMPLED,
    {**SAMPLED, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {**SAMPLED, "logit_bias": {5: 3.0, 6: -math.inf}, "min_tokens": 4, "stop_token_ids": [5, 7, 8], "logprobs": 3},
    {**SAMPLED, "stop": ["e", "t "], "max_tokens": None, "seed": 2**64 - 1},
]


@pytest.mark.parametrize("params", VARIANTS, ids=range(len(VARIANTS)))
def test_a_batch_gives_what_each_prompt_gives_alone(chars: Model, params: dict[str, Any]) -> None:
    alone = [chars.generate(p, **params) for p in PROMPTS]
    batch = chars.generate(PROMPTS, **params)
    with load(CHARS, cache_tokens=1) as small:  # room for one full sequence, so they take turns
        waves = small.generate(PROMPTS, **params)
    streamed = collect(chars, PROMPTS, **params)
    for one, two, three, deltas in zip(alone, batch, waves, streamed, strict=True):
        assert one.tokens == two.tokens == three.tokens == [d.token.id for d in deltas]
        assert one.text == two.text == three.text == "".join(d.text for d in deltas)
        assert one.finish_reason == two.finish_reason == three.finish_reason == deltas[-1].finish_reason
        assert all(d.finish_reason is None for d in deltas[:-1])
        if params.get("logprobs") is not None:
            assert one.logprobs is not None
            assert two.logprobs is not None
            for a, b in zip(one.logprobs, two.logprobs, strict=True):
                assert [i for i, _ in a.top] == [i for i, _ in b.top]
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert batch[2].tokens == batch[4].tokens


def collect(model: Model, prompts: list[str], **params: Any) -> list[list[cuplama.Delta]]:
    found: list[list[cuplama.Delta]] = [[] for _ in prompts]
    for delta in model.stream(prompts, **params):
        found[delta.index].append(delta)
    return found


def test_seeds(chars: Model) -> None:
    params = {**SAMPLED, "max_tokens": 20}
    texts = {seed: chars.generate("The", **{**params, "seed": seed}).text for seed in (0, 1, 2**32, 2**64 - 1)}
    assert len(set(texts.values())) == 4
    assert chars.generate("The", **{**params, "seed": np.uint64(2**64 - 1)}).text == texts[2**64 - 1]
    fresh = {chars.generate("The", **{**params, "seed": None}).text for _ in range(3)}
    assert len(fresh) > 1


# --- Stopping -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(chars: Model) -> str:
    """The greedy continuation of "First", one token per character, up to the full context."""
    done = chars.generate("First", max_tokens=None, temperature=0)
    assert len(done.text) == len(done.tokens) == 75
    return done.text


def test_max_tokens(chars: Model, greedy: str) -> None:
    n: Any
    for n in (1, 7, 74, 75, 76, 10**20, np.int64(7)):
        done = chars.generate("First", max_tokens=n)
        assert (done.text, done.finish_reason) == (greedy[: min(int(n), 75)], "length")
    done = chars.generate("First", max_tokens=0)
    assert (done.text, done.tokens, done.finish_reason) == ("", [], "length")
    assert list(chars.stream("First", max_tokens=0)) == []
    assert done.timings.decode_rate == done.timings.decode_tokens == 0


def test_the_context_limit(chars: Model) -> None:
    done = chars.generate([3] * 79, max_tokens=None)
    assert (len(done.tokens), done.finish_reason) == (1, "length")
    assert chars.generate([3] * 80, max_tokens=0).tokens == []
    for length in (80, 81):
        with pytest.raises(ContextError, match=f"the prompt has {length} tokens; the context has room for 79"):
            chars.generate([3] * length, max_tokens=1)
    with pytest.raises(ContextError, match="81 tokens; the context has room for 80"):
        chars.generate([3] * 81, max_tokens=0)
    with load(CHARS, context=10) as short:
        assert (short.context, len(short.generate([3] * 9).tokens)) == (10, 1)
        with pytest.raises(ContextError, match=r"has room for 9; the model allows 80 \(--context\)"):
            short.generate([3] * 10)


def test_stop_strings(chars: Model, greedy: str) -> None:
    for length in (1, 2, 5):
        stop = greedy[20 : 20 + length]
        done = chars.generate("First", max_tokens=None, stop=stop)
        at = greedy.index(stop)
        assert (done.text, done.finish_reason) == (greedy[:at], "stop")
        assert len(done.tokens) == at + length  # the tokens that make up the stop string were drawn
    later, sooner = greedy[30:34], greedy[10:14]
    ends = {s: greedy.index(s) + len(s) for s in (later, sooner)}
    first = min(ends, key=lambda s: ends[s])
    assert chars.generate("First", max_tokens=None, stop=[later, sooner]).text == greedy[: greedy.index(first)]


def test_stop_strings_that_do_not_stop(chars: Model, greedy: str) -> None:
    stop: Any
    for stop in ([], None, (), "never seen", greedy[-5:] + "!"):  # the last one is held back, and given at the end
        done = chars.generate("First", max_tokens=None, stop=stop)
        assert (done.text, done.finish_reason) == (greedy, "length")
    assert "First" not in greedy
    assert chars.generate("First", max_tokens=None, stop=["First", "irst"]).text == greedy  # it is in the prompt


def test_stop_string_with_the_last_token(chars: Model, greedy: str) -> None:
    stop = greedy[10:13]
    at = greedy.index(stop)
    done = chars.generate("First", max_tokens=at + 3, stop=stop)
    assert (done.text, done.finish_reason) == (greedy[:at], "stop")
    done = chars.generate("First", max_tokens=at + 2, stop=stop)
    assert (done.text, done.finish_reason) == (greedy[: at + 2], "length")


def test_stop_tokens(chars: Model, greedy: str) -> None:
    ids = chars.encode(greedy)
    stop = ids[12]
    at = ids.index(stop)
    done = chars.generate("First", max_tokens=None, stop_token_ids=[stop])
    assert (done.tokens, done.text, done.finish_reason) == (ids[: at + 1], greedy[:at], "stop")
    assert chars.generate("First", max_tokens=at + 1, stop_token_ids=[stop]).finish_reason == "stop"
    kind: Any
    for kind in ({stop}, np.array([stop]), (np.int64(stop),)):
        assert chars.generate("First", max_tokens=None, stop_token_ids=kind).tokens == done.tokens
    late = chars.generate("First", max_tokens=40, stop_token_ids=[stop], min_tokens=at + 3)
    assert late.tokens[:at] == ids[:at]
    assert stop not in late.tokens[: at + 3]
    every = list(range(64))  # all but one of the vocabulary
    held = chars.generate("First", max_tokens=9, stop_token_ids=every, min_tokens=4)
    assert held.tokens[:4] == [64] * 4
    late = chars.generate([3] * 77, max_tokens=None, stop_token_ids=every, min_tokens=2**40)
    assert late.tokens == [64] * 3


def test_the_models_own_stop_tokens(tmp_path: Path) -> None:
    config = json.loads((LLAMA / "config.json").read_text())
    with load(LLAMA, context=64) as model:
        ids = model.generate([5, 6, 7], max_tokens=20, ignore_eos=True).tokens
    stop = ids[6]
    at = ids.index(stop)
    for files in (
        {"config": {**config, "eos_token_id": stop}, "generation_config": None},
        {"config": {**config, "eos_token_id": [95, stop]}, "generation_config": {}},
        {"config": {**config, "eos_token_id": None}, "generation_config": {"eos_token_id": [stop]}},
        {"config": {**config, "eos_token_id": 10**6}, "generation_config": {"eos_token_id": stop}},
    ):
        with load(copy(LLAMA, tmp_path, **files), context=64) as model:
            assert stop in model.stop_ids
            done = model.generate([5, 6, 7], max_tokens=20)
            assert (done.tokens, done.finish_reason) == (ids[: at + 1], "stop")
            assert model.generate([5, 6, 7], max_tokens=20, ignore_eos=True).tokens == ids
            assert len(model.generate([5, 6, 7], max_tokens=20, min_tokens=20).tokens) == 20


# --- What was drawn -------------------------------------------------------------------------------


def test_logprobs(llama: Model) -> None:
    prompt = [5, 6, 7, 8]
    for params in ({"temperature": 0}, {**SAMPLED, "repetition_penalty": 1.5, "logit_bias": {3: 9.0}}):
        params = {**params, "max_tokens": 10, "ignore_eos": True}
        done = llama.generate(prompt, logprobs=4, **params)
        logits = llama.logits(prompt + done.tokens)[len(prompt) - 1 : -1].astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert done.logprobs is not None
        assert [t.id for t in done.logprobs] == done.tokens
        for token, row in zip(done.logprobs, wanted, strict=True):
            assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
            assert [i for i, _ in token.top] == np.argsort(-row, kind="stable")[:4].tolist()
            assert [v for _, v in token.top] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
        bare = llama.generate(prompt, logprobs=0, **params)
        assert bare.tokens == done.tokens == llama.generate(prompt, **params).tokens
        assert bare.logprobs is not None
        assert [t.top for t in bare.logprobs] == [()] * 10
    done = llama.generate(prompt, logprobs=64, max_tokens=1)
    assert done.logprobs is not None
    assert len(done.logprobs[0].top) == 64


def test_penalties_and_bias(chars: Model, greedy: str) -> None:
    ids = chars.encode(greedy)
    bias: Any = {ids[0]: -math.inf, np.int64(ids[1]): -1e9}
    banned = chars.generate("First", max_tokens=None, logit_bias=bias)
    assert not {ids[0], ids[1]} & set(banned.tokens)
    assert chars.generate("First", max_tokens=9, logit_bias={17: 1e9}).tokens == [17] * 9
    spread = chars.generate("First", max_tokens=60, presence_penalty=1e9)
    assert len(set(spread.tokens)) == 60  # nothing comes twice
    again = chars.generate("First", max_tokens=60, presence_penalty=-1e9)
    assert len(set(again.tokens)) == 1
    rising = chars.generate("First", max_tokens=65, frequency_penalty=1e9)
    assert sorted(rising.tokens) == list(range(65))
    prompt = chars.encode("First")
    assert not set(prompt) & set(chars.generate("First", max_tokens=30, repetition_penalty=1e6).tokens[:1])


def test_top_k_beyond_the_vocabulary_is_off(chars: Model) -> None:
    params: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "seed": 3}
    wanted = chars.generate("The", **params).tokens
    assert chars.generate("The", top_k=10**30, **params).tokens == wanted
    assert chars.generate("The", top_k=65, **params).tokens == wanted
    greedy = chars.generate("The", max_tokens=20).tokens
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-30}):
        assert chars.generate("The", **{**params, **narrow}).tokens == greedy


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temprature": 1}, "temprature is not a sampling parameter; there are: max_tokens"),
        ({"max_tokens": -1}, "max_tokens = -1 is out of range; it must be a whole number >= 0, or None"),
        ({"logit_bias": {65: 1.0}}, "logit_bias: token id 65 is out of range; the vocabulary has 65"),
        ({"stop_token_ids": [3, 65]}, "stop_token_ids: token id 65 is out of range"),
        ({"logit_bias": dict.fromkeys(range(65), -math.inf)}, "bans every token"),
        ({"stop_token_ids": range(65), "min_tokens": 1}, "bans every token"),
        ({"max_tokens": "5"}, "max_tokens = '5' is a str; it must be a whole number >= 0, or None"),
        ({"max_tokens": 3, "min_tokens": 4}, "max_tokens = 3 is less than min_tokens = 4"),
        ({"n": 0}, "n = 0 is out of range; it must be a whole number >= 1, or None"),
        ({"n": -1}, "n = -1 is out of range"),
        ({"n": True}, "n = True is a bool; it must be a whole number >= 1, or None"),
        ({"n": "2"}, "n = '2' is a str"),
        ({"n": 2.0}, "n = 2.0 is a float"),
    ],
)
def test_parameters_that_cannot_be_used(chars: Model, params: dict[str, Any], words: str) -> None:
    for call in (chars.generate, chars.stream):
        with pytest.raises(ValueError, match=words):
            call("First", **params)


def test_parameters_as_an_object(chars: Model, tmp_path: Path) -> None:
    """A SamplingParams is complete: what the model's generation_config sets does not count beside it."""
    params = SamplingParams(max_tokens=12, temperature=1.2, seed=11)
    wanted = chars.generate("First", max_tokens=12, temperature=1.2, seed=11)
    assert chars.generate("First", params).tokens == wanted.tokens
    assert [d.token.id for d in chars.stream("First", params)] == wanted.tokens
    assert chars.generate("First", params=params, max_tokens=5).tokens == wanted.tokens[:5]
    assert [c.tokens for c in chars.generate(["First", "First"], params, seed=11)] == [wanted.tokens] * 2
    assert chars.params(params) is params
    assert chars.params(params, top_k=3) == SamplingParams(max_tokens=12, temperature=1.2, seed=11, top_k=3)
    settings = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 7}
    with load(copy(CHARS, tmp_path, generation_config=settings)) as model:
        assert model.params() == SamplingParams(temperature=0.5, max_tokens=7, top_k=50)
        assert model.params(top_k=3, temperature=0) == SamplingParams(temperature=0, max_tokens=7, top_k=3)
        assert model.params(SamplingParams()) == SamplingParams()
        assert model.params(SamplingParams(), top_k=3) == SamplingParams(top_k=3)
        assert (
            model.generate("First", SamplingParams(), max_tokens=9).text == chars.generate("First", max_tokens=9).text
        )


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"max_tokens": 5},
            r"params = {'max_tokens': 5} is a dict; it must be a SamplingParams, or None \(give single",
        ),
        ("Second", "params = 'Second' is a str; .* and several prompts as one list"),
        (5, "params = 5 is an int"),
        (SamplingParams, "is a type"),
        (False, "params = False is a bool"),
    ],
)
def test_parameters_of_a_wrong_kind(chars: Model, params: Any, words: str) -> None:
    for call in (lambda: chars.generate("First", params), lambda: chars.stream("First", params)):
        with pytest.raises(ParameterError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ParameterError, match=words):
        chars.params(params)


# --- Without a tokenizer --------------------------------------------------------------------------


def test_a_folder_without_tokenizer_takes_ids(llama: Model) -> None:
    done = llama.generate([5, 6, 7], max_tokens=5, ignore_eos=True)
    assert (len(done.tokens), done.text) == (5, "")
    for call in (
        lambda: llama.generate("text"),
        lambda: llama.stream("text"),
        lambda: llama.chat([{"role": "user", "content": "Hi"}]),
        lambda: llama.generate([5], stop="x"),
    ):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
            call()


def test_chat(chars: Model, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        chars.chat([{"role": "user", "content": "Hi"}])
    folder = copy(CHARS, tmp_path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}:{% endfor %}")
    with load(folder) as model:
        done = model.chat([{"role": "user", "content": "Hi"}], max_tokens=7)
        assert done.tokens == model.generate("Hi:", max_tokens=7).tokens
        deltas = model.stream_chat([{"role": "user", "content": "Hi"}], max_tokens=7)
        assert "".join(d.text for d in deltas) == done.text


# --- The object itself ----------------------------------------------------------------------------


def test_repr_of_a_model(chars: Model, llama: Model) -> None:
    assert repr(llama) == "<Model llama3-gqa: LlamaForCausalLM, 20 K parameters, float32 on NumPy, context 128>"
    assert chars.num_parameters == sum(w.size for w in unique_arrays(chars))
    with cuplama.load(device="numpy") as model:
        assert repr(model) == "<Model stories-7m: LlamaForCausalLM, 7.6 M parameters, float32 on NumPy, context 1024>"
        assert repr(model.tokenizer) == "<Tokenizer of 4096 tokens: BOS 0, EOS 0, no chat template>"
        assert repr(model.config) == (
            "<ModelConfig LlamaForCausalLM: 4 layers of 384, 6 heads and 2 KV heads of 64, feed-forward 960, "
            "vocabulary 4096, context 1024>"
        )
        assert repr(model.engine).startswith("<Engine LlamaForCausalLM on numpy, cache of ")
        assert not model.closed
    assert model.closed
    assert repr(model) == "<Model stories-7m: closed>"


def unique_arrays(model: Model) -> list[np.ndarray[Any, Any]]:
    values = model.engine.runner.values
    return list({id(values[name]): values[name] for name in model.config.weight_shapes()}.values())


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has the name that it was loaded by, and is found by it again."""
    folder = copy(CHARS, tmp_path / "some name")
    monkeypatch.chdir(folder)
    for given in (str(folder), ".", "../some name"):
        with load(Path(given)) as model:
            assert model.name == str(Path(given))
            assert repr(model).startswith("<Model some name: GPT2LMHeadModel, ")
            assert model.generate("First", max_tokens=1).model == model.name
    with cuplama.load(device="numpy") as bundled, cuplama.load(bundled.name, device="numpy") as again:
        assert bundled.name == "stories-7m"
        assert again.folder == bundled.folder


def test_a_model_is_not_pickled(chars: Model) -> None:
    said = rf"^a model can be neither pickled nor copied: call cuplama\.load\('{chars.name}'\) in each process"
    for call in (pickle.dumps, copy_module.copy, copy_module.deepcopy):
        with pytest.raises(CopyError, match=said):
            call(chars)
        with pytest.raises(CopyError, match=r"^a stream can be neither pickled nor copied"):
            call(chars.stream("First"))
    for inside in ([chars], chars.generate):
        with pytest.raises(CopyError, match=said):
            pickle.dumps(inside)
    process = multiprocessing.get_context("spawn").Process(target=print, args=(chars,))
    with pytest.raises(TypeError, match=r"cuplama\.load"):
        process.start()


# --- A trained model ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["stories260K", "stories260K-bf16", "stories260K-sharded"])
def test_stories260k_tells_its_known_story(shared: Path, folder: str) -> None:
    wanted = (shared / "models/stories260K.expected.txt").read_text().strip()
    with load(shared / "models" / folder) as model:
        done = model.generate("", max_tokens=200, temperature=0)
        assert len(done.tokens) == 200
        # The weights in BF16 are rounded: at token 185 two logits that are 0.004 apart change places, as they do for
        # transformers with these weights in float32.
        same = 185 if folder.endswith("bf16") else 200
        assert wanted.startswith(model.tokenizer.decode(done.tokens[:same]).strip())
        assert same < 200 or done.text.strip() == wanted
        batch = model.generate(["", "Once upon a time", "Lily"], max_tokens=20, temperature=0)
        assert wanted.startswith(batch[0].text.strip())
        text = model.tokenizer.encode("Once upon a time") + batch[1].tokens
        assert model.tokenizer.decode(text) == "Once upon a time" + batch[1].text
