"""What a text must look like: forms as parameters and as OpenAI's response_format."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest

import cuplama
from cuplama import Model, SamplingParams
from cuplama.errors import ParameterError
from cuplama.output_form import MAX_TEXT, asked_form

SCHEMA = {"type": "array", "items": {"enum": [1, "é"]}}


def test_a_schema_is_kept_as_plain_python() -> None:
    given: Any
    for given in (SCHEMA, '{"type": "array", "items": {"enum": [1, "\\u00e9"]}}', UserDict(SCHEMA)):
        assert SamplingParams(json_schema=given).json_schema == SCHEMA
    assert SamplingParams(json_schema=True).json_schema == {"type": "object"}
    kept: Any = SamplingParams(json_schema=SCHEMA).json_schema
    assert kept is not SCHEMA
    assert list(kept) == ["type", "items"]  # the order, which that of properties follows


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{bad", "json_schema = '{bad' is no JSON: Expecting property name"),
        ('{"minimum": NaN}', "NaN is no number of JSON"),
        ({"minimum": float("inf")}, "is no JSON: Out of range float values"),
        ({"a": object()}, "is no JSON: 'object' object is not iterable"),
        ("[" * 100_000, "json_schema is nested too deeply"),
        ({"enum": ["x" * MAX_TEXT]}, f"characters; the most is {MAX_TEXT}"),
    ],
    ids=range(6),
)
def test_what_is_no_schema_is_named(value: Any, words: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(json_schema=value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_text_of_a_form_has_a_largest_length() -> None:
    assert SamplingParams(regex="a" * MAX_TEXT).regex
    with pytest.raises(ParameterError, match=f"is out of range; it must be a regular expression of 1 to {MAX_TEXT} "):
        SamplingParams(regex="a" * (MAX_TEXT + 1))


def test_a_text_has_one_form() -> None:
    with pytest.raises(ParameterError, match=r"^json_schema and grammar are both given; at most one of json_schema, r"):
        SamplingParams(json_schema=True, grammar="start: A")
    with pytest.raises(ParameterError, match=r"^response_format and regex are both given"):
        asked_form({"response_format": {"type": "json_object"}, "regex": "a"})


def test_response_format_becomes_a_parameter() -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'cuplama[serve]'")
    with cuplama.load(device="numpy", context=128) as model:
        _check_asked(model)


def _check_asked(model: Model) -> None:
    def asked(**response_format: Any) -> Any:
        return model.params(response_format=response_format).json_schema

    assert asked(type="text") is None
    assert asked(type="json_object") == {"type": "object"}
    assert asked(type="json_schema", json_schema={"name": "x", "strict": True, "schema": SCHEMA}) == SCHEMA
    assert model.params(SamplingParams(top_k=3), response_format={"type": "json_object"}).top_k == 3
    assert model.params(response_format=None, regex="a").regex == "a"
    with pytest.raises(ParameterError, match=r"^json_schema and regex are both"):
        model.params(SamplingParams(regex="a"), response_format={"type": "json_object"})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("json", "response_format = 'json' is a str; it must be a mapping with a type"),
        ({}, "type = None is not supported; supported: text, json_object, json_schema"),
        ({"type": "structural_tag"}, "type = 'structural_tag' is not supported"),
        ({"type": "json_schema"}, 'json_schema must hold the schema: {"name": ..., "schema": {...}}'),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "json_schema must hold the schema"),
    ],
)
def test_what_is_no_response_format_is_named(value: Any, words: str) -> None:
    with pytest.raises(ParameterError) as caught:
        asked_form({"response_format": value})
    assert words in str(caught.value)
