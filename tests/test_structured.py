"""Texts that follow a schema, a regular expression or a grammar, on the bundled model and on random draws."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuplama
from cuplama import Model, SamplingParams
from cuplama.engine.constraint import mask_words
from cuplama.engine.sequence import SequenceState
from cuplama.errors import ParameterError, TokenizerError
from cuplama.folders import data_folder
from cuplama.structured import Grammars
from cuplama.text.token_bytes import TokenBytes
from cuplama.text.tokenizer import Tokenizer
from tests.gguf_files import write_gguf
from tests.paths import ROOT
from tests.text.test_gguf_tokenizer import SPM

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'cuplama[serve]'")

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "big", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = "Once upon a time"
INF = float("inf")


@pytest.fixture(scope="module")
def stories() -> Iterator[Model]:
    with cuplama.load(device="numpy", context=128, cache_tokens=1024) as model:
        yield model


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Of the bundled model's tokenizer, whose token 0 ends a text."""
    tokenizer = Tokenizer.load(data_folder("weights"))
    return Grammars(lambda: tokenizer, tokenizer.vocab_size, {0})


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value has the form of a schema, for the keywords that these tests use."""
    if "enum" in schema:
        return any(value == e and type(value) is type(e) for e in schema["enum"])
    if "anyOf" in schema:
        return any(fits(value, s) for s in schema["anyOf"])
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        names = isinstance(value, dict) and set(schema["required"]) <= value.keys() <= known.keys()
        return names and all(fits(v, known[k]) for k, v in value.items())
    if kind == "array":
        some = isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        return some and all(fits(v, schema["items"]) for v in value)
    if kind == "string":
        return isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
    types: dict[str, type] = {"integer": int, "boolean": bool, "null": type(None)}
    return type(value) is types[kind] and (kind != "integer" or schema["minimum"] <= value <= schema["maximum"])


def walk(grammars: Grammars, rng: np.random.Generator, stops: tuple[int, ...] = (0,), **params: Any) -> list[int]:
    """The tokens of a model that draws any allowed token, till the end; at most 400."""
    constraint = grammars.constraint(SamplingParams(**params), stops)
    assert constraint is not None
    row = np.empty(mask_words(grammars._vocab_size), np.int32)
    tokens: list[int] = []
    while not constraint.finished and len(tokens) < 400:
        constraint.fill_mask(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        assert allowed[-1] < grammars._vocab_size
        tokens.append(int(rng.choice(allowed)))
        constraint.accept(tokens[-1])
    assert constraint.error is None, constraint.error
    return tokens


def text_of(grammars: Grammars, tokens: list[int]) -> str:
    return grammars._tokenizer().decode(tokens)


# --- The bundled model -------------------------------------------------------------------------------------------


def test_json_of_a_schema(stories: Model) -> None:
    for options in ({"json_schema": PERSON}, {"json_schema": json.dumps(PERSON)}):
        done = stories.generate(PROMPT, seed=1, **options)
        assert fits(json.loads(done.text), PERSON)
        assert done.finish_reason == "stop"
        assert done.tokens[-1] not in stories.stop_ids  # nothing may follow: no step is spent on a stop token
        assert "\n" not in done.text
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    assert stories.generate(PROMPT, seed=1, response_format=asked).text == done.text


def test_parameters_are_refused_before_a_call(stories: Model) -> None:
    with pytest.raises(ParameterError, match="unclosed group"):
        stories.params(regex="a(")
    stories.params(regex="a{3}!")
    before = stories._grammars._compiled.cache_info()
    assert stories.generate(PROMPT, regex="a{3}!").text == "aaa!"
    assert stories._grammars._compiled.cache_info().misses == before.misses


def test_choices_follow_the_grammar_each_for_itself(stories: Model) -> None:
    found = stories.generate([PROMPT, "The dog"], n=4, regex="[A-Z][a-z]{2,5}( [a-z]{1,6}){1,2}[.!]", seed=5)
    assert len(found) == 8
    assert all(re.fullmatch("[A-Z][a-z]{2,5}( [a-z]{1,6}){1,2}[.!]", c.text) for c in found)
    assert len({c.text for c in found}) > 4
    alone = stories.generate(PROMPT, regex="[A-Z][a-z]{2,5}( [a-z]{1,6}){1,2}[.!]", seed=7)
    assert alone.text == found[2].text


def test_rows_without_a_grammar_have_the_text_that_they_have_alone(stories: Model) -> None:
    def sequences(bound: bool) -> list[SequenceState]:
        found = []
        for i, form in enumerate((None, {"json_schema": PERSON}, None, {"regex": "[ab]+c"}, None)):
            params = stories.params(seed=i, max_tokens=20, **(form or {}))
            if form is None or bound:
                constraint = stories._grammars.constraint(params, stories.stop_ids)
                ids = stories.encode(PROMPT)
                found.append(SequenceState(ids, params, stories.stop_ids, constraint=constraint))
        return found

    mixed, free = sequences(True), sequences(False)
    for batch in (mixed, free):
        for _ in stories.engine.generate(batch):
            pass
    assert [s.tokens for s in mixed if s.constraint is None] == [s.tokens for s in free]
    assert re.fullmatch("[ab]+c?", stories.decode(mixed[3].tokens[len(mixed[3].prompt) :]))


def test_streams_and_log_probabilities(stories: Model) -> None:
    done = stories.generate(PROMPT, regex="(yes|no)!", logprobs=1, temperature=0)
    assert "".join(d.text for d in stories.stream(PROMPT, regex="(yes|no)!", temperature=0)) == done.text
    assert done.logprobs is not None
    raw = stories.logits(PROMPT)[-1]
    first = done.logprobs[0]
    assert first.logprob == pytest.approx(raw[first.id] - np.log(np.exp(raw.astype(np.float64)).sum()), abs=1e-4)
    assert first.top[0][0] == int(raw.argmax()) != first.id


def test_a_text_that_is_cut_is_only_a_beginning(stories: Model) -> None:
    done = stories.generate(PROMPT, json_schema=PERSON, max_tokens=5, seed=1)
    assert (done.finish_reason, len(done.tokens)) == ("length", 5)
    stopped = stories.generate(PROMPT, json_schema=PERSON, stop=['"age'], seed=1)
    assert stopped.finish_reason == "stop"
    assert stopped.text.startswith('{"name": "')
    assert '"age' not in stopped.text


def test_the_example_of_the_documentation() -> None:
    text = (ROOT / "docs" / "structured.md").read_text(encoding="utf-8")
    code, printed = re.findall(r"^```(?:python)?\n(.*?)^```$", text, re.M | re.S)[:2]
    with redirect_stdout(StringIO()) as out:
        exec(code, {})
    assert out.getvalue() == printed


def test_a_model_without_a_tokenizer(llama: Model) -> None:
    with pytest.raises(TokenizerError):
        llama.generate([1], regex="a")


def test_a_model_without_stop_tokens(chars: Model) -> None:
    assert not chars.stop_ids
    assert re.fullmatch("[A-Z]{3}", chars.generate("First", regex="[A-Z]{3}").text)


# --- Random draws: whatever a model prefers ----------------------------------------------------------------------

LEAVES = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["boolean", "null"])}),
    st.tuples(st.integers(-30, 30), st.integers(0, 200)).map(
        lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda t: {"type": "string", "minLength": t[0], "maxLength": t[0] + t[1]}
    ),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-5, 5), st.none()), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)


def _object(t: tuple[dict[str, Any], bool]) -> dict[str, Any]:
    required = list(t[0]) if t[1] else list(t[0])[:1]
    return {"type": "object", "properties": t[0], "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1] // 2, "maxItems": t[1]}
        ),
        st.tuples(st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3), st.booleans()).map(_object),
        st.lists(inner, min_size=1, max_size=2).map(lambda schemas: {"anyOf": schemas}),
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(SCHEMAS, st.integers(0, 2**32))
def test_any_small_schema(grammars: Grammars, schema: dict[str, Any], seed: int) -> None:
    tokens = walk(grammars, np.random.default_rng(seed), json_schema=schema)
    assert fits(json.loads(text_of(grammars, tokens)), schema)


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        ('start: "cat" NUM?\nNUM: /[0-9]{1,3}/', r"cat\d{0,3}"),
        ('root ::= "cat" num?\nnum ::= [0-9] [0-9]', r"cat(\d\d)?"),
        ('start: "a" %json {"type": "integer", "minimum": 1, "maximum": 5} "b"', "a[1-5]b"),
        ("start: /é{2}|🦙/", "éé|🦙"),
    ],
)
def test_grammars_in_both_notations(grammars: Grammars, grammar: str, wanted: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        tokens = walk(grammars, rng, grammar=grammar)
        assert re.fullmatch(wanted, text_of(grammars, tokens))
        assert 0 not in tokens[:-1]


def test_vocabularies_of_every_kind(tmp_path: Path) -> None:
    """Of a GGUF file, and a model whose logits are more than the tokenizer has tokens, or fewer."""
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "m.gguf", SPM))
    for size in (tokenizer.vocab_size, 300, 320, 262):
        grammars = Grammars(lambda: tokenizer, size, {2} if size < 300 else ())
        tokens = walk(grammars, np.random.default_rng(size), regex=r"ab [a-f]{3}\n\xe9")
        spelled = TokenBytes(tokenizer, size)
        text = b"".join(spelled.tokens[t] for t in tokens if t not in spelled.hidden).decode()
        assert re.fullmatch(r"ab [a-f]{3}\n\xe9", text)


# --- Where a text ends -------------------------------------------------------------------------------------------


def allowed(grammars: Grammars, text: str, stops: tuple[int, ...] = (0,), **params: Any) -> set[int]:
    """What may be drawn after the tokens of a text."""
    constraint = grammars.constraint(SamplingParams(**params), stops)
    assert constraint is not None
    row = np.empty(mask_words(grammars._vocab_size), np.int32)
    for token in grammars._tokenizer().encode(text, bos=False):
        constraint.accept(token)
    constraint.fill_mask(row)
    assert constraint.error is None
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def test_stop_tokens_are_allowed_exactly_where_the_grammar_may_end(grammars: Grammars) -> None:
    (b,) = grammars._tokenizer().encode("b", bos=False)
    assert 0 not in allowed(grammars, "", regex="a+")
    assert 0 in allowed(grammars, "a", regex="a+")
    more = {0, 5, b}
    assert allowed(grammars, "", (0, 5), regex="a+", stop_token_ids=[5]) & more == set()
    assert allowed(grammars, "a", (0, 5), regex="a+", stop_token_ids=[5]) & more == {0, 5}


def test_stop_tokens_wait_for_min_tokens_and_ignore_eos_as_long_as_anything_else_may_follow(
    grammars: Grammars,
) -> None:
    assert 0 not in allowed(grammars, "a", regex="a+", min_tokens=2)
    assert 0 in allowed(grammars, "aa", regex="a+", min_tokens=1)
    assert 0 not in allowed(grammars, "a", (), regex="a+", ignore_eos=True)
    for params in ({"min_tokens": 9}, {"ignore_eos": True}):
        tokens = walk(grammars, np.random.default_rng(0), (), regex="ab?", **params)
        assert text_of(grammars, tokens) == "ab"
    assert len(walk(grammars, np.random.default_rng(0), regex="a*", min_tokens=9)) >= 9


def test_a_ban_of_all_that_may_follow_is_an_error(grammars: Grammars, stories: Model) -> None:
    (a,) = grammars._tokenizer().encode("a", bos=False)
    assert a not in allowed(grammars, "", regex="a|b", logit_bias={a: -INF})
    others = {i: -INF for i in range(grammars._vocab_size) if i != a}
    assert allowed(grammars, "", regex="[ab]+", logit_bias=others) == {a}
    constraint = grammars.constraint(SamplingParams(regex="a", logit_bias={a: -INF}), ())
    assert constraint is not None
    row = np.zeros(mask_words(grammars._vocab_size), np.int32)
    constraint.fill_mask(row)
    assert (row == -1).all()  # something can be drawn, which nobody reads
    assert constraint.finished
    assert str(constraint.error) == "regex: after 0 tokens: logit_bias bans every token that may follow"
    with pytest.raises(ParameterError, match="logit_bias bans every token that may follow"):
        stories.generate(PROMPT, regex="a", logit_bias={a: -INF})
    assert stories.generate(PROMPT, max_tokens=3).text  # the next call is as good as any


# --- What cannot be a grammar, or costs too much -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"regex": "a("}, r"regex = 'a\(': .*unclosed group"),
        ({"regex": "a(?=b)"}, "look-around.* is not supported"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
        ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
        ({"json_schema": {"not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json_schema": {"$ref": "#"}}, "json_schema = "),
        ({"grammar": 'start: "a" b'}, 'unknown name: "b"'),
        ({"grammar": 'root ::= "a" b'}, "'b' not found"),
        ({"grammar": "root ::= ((("}, r"Expected '\)'"),
        ({"grammar": "start: <|nothing|>"}, "nothing"),
    ],
)
def test_what_is_no_grammar_is_refused_with_its_own_words(
    grammars: Grammars, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        grammars.constraint(SamplingParams(**params), ())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


def _nested(links: int, step: str, last: str) -> str:
    return "{" + ",".join(f'"d{i}":{step.replace("NEXT", f"#/$defs/d{i + 1}")}' for i in range(links)) + f",{last}}}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("grammar", 'start: A\nA: B{100}\nB: C{100}\nC: D{100}\nD: "x"'),
        ("grammar", 'start: ("a" "b"){100000}'),
        ("grammar", "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000),
        ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"'),
        ("grammar", "root ::= r0 " + " ".join(f"r{i} ::= r{i + 1}" for i in range(7000))),
        ("regex", "a?" * 60_000),
        ("json_schema", '{"enum": [' + ",".join(f'"{i * 7919}"' for i in range(13_000)) + "]}"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200),
        (
            "json_schema",
            json.dumps({"allOf": [{"anyOf": [{"required": [f"{c}{i}"]} for c in "ab"]} for i in range(22)]}),
        ),
    ],
    ids=range(9),
)
def test_hostile_grammars_are_refused_soon(grammars: Grammars, name: str, text: str) -> None:
    began = time.monotonic()
    with pytest.raises(ParameterError) as caught:
        _begin(grammars, name, text)
    assert len(str(caught.value)) < 450
    assert time.monotonic() - began < 10  # 1 s on an idle core


def _begin(grammars: Grammars, name: str, text: str) -> None:
    """The first tokens under a grammar; raises what the call, or the sequence, fails with."""
    constraint = grammars.constraint(SamplingParams.from_dict({name: text}), ())
    assert constraint is not None
    row = np.empty(mask_words(grammars._vocab_size), np.int32)
    for token in grammars._tokenizer().encode("aaaa", bos=False):
        constraint.fill_mask(row)
        constraint.accept(token)
    if constraint.error is not None:
        raise constraint.error


@pytest.mark.parametrize(
    "step",
    [
        '{"$ref":"NEXT"}',
        '{"type":"object","properties":{"a":{"$ref":"NEXT"}},"required":["a"]}',
        '{"anyOf":[{"$ref":"NEXT"},{"const":0}]}',
        '{"allOf":[{"$ref":"NEXT"},{"minLength":1}]}',
    ],
)
def test_references_in_a_row_do_not_overflow_the_stack(grammars: Grammars, step: str) -> None:
    """They are followed by recursion: on 8 MB, 1,000 of them ended the process."""
    links = 1400
    defs = _nested(links, step, f'"d{links}":{{"type":"string","maxLength":3}}')
    constraint = grammars.constraint(SamplingParams(json_schema=f'{{"$ref":"#/$defs/d0","$defs":{defs}}}'), ())
    row = np.empty(mask_words(grammars._vocab_size), np.int32)
    assert constraint is not None
    constraint.fill_mask(row)
    assert constraint.error is None


def test_a_grammar_that_came_to_its_limit_is_compiled_again(grammars: Grammars) -> None:
    params = SamplingParams(regex="[ab]*c")
    first = grammars.constraint(params, ())
    hits = grammars._compiled.cache_info().hits
    assert first is not None
    assert grammars.constraint(params, ()) is not first
    assert grammars._compiled.cache_info().hits == hits + 1
    first.accept(grammars._tokenizer().encode("x", bos=False)[0])  # as if its mask had been wrong
    assert first.finished
    assert "after 1 tokens" in str(first.error)
    assert grammars._compiled.cache_info().currsize == 0
    tokens = walk(grammars, np.random.default_rng(0), regex="[ab]{3}c")
    assert re.fullmatch("[ab]{3}c", text_of(grammars, tokens))


def test_llguidance_is_asked_for_only_by_a_grammar(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars._forget()
    assert grammars.constraint(SamplingParams(), ()) is None
    with pytest.raises(ParameterError, match=r"^regex needs llguidance .*: pip install 'cuplama\[serve\]'$"):
        grammars.constraint(SamplingParams(regex="a"), ())


def test_a_vocabulary_without_the_characters_is_named(chars: Model) -> None:
    with pytest.raises(ParameterError, match=r"^json_schema = .*: the vocabulary has no token that could come next$"):
        chars.generate("First", json_schema=True)  # it has no braces
    with pytest.raises(ParameterError, match=r"^grammar: after 1 tokens: the vocabulary has no token that could come"):
        chars.generate("First", grammar='start: "a" "{" "b"')
