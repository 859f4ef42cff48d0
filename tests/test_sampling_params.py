"""Sampling parameters: what they may be, how they are kept, and how they travel as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cuplama.errors import ParameterError
from cuplama.sampling_params import OPTIONS, PARAMETERS, SamplingOptions, SamplingParams, read_parameter

Array = np.ndarray[Any, Any]

INF, NAN = math.inf, math.nan
BAD: dict[str, list[Any]] = {  # of the right type, out of range
    "max_tokens": [-1],
    "min_tokens": [-1],
    "temperature": [-0.1, NAN, INF, 10**400],
    "top_k": [-2],
    "top_p": [-0.01, 1.01, NAN, 10**400],
    "min_p": [-0.01, 1.01, NAN],
    "repetition_penalty": [0, -1, NAN, INF, 1e7, 1e-7],
    "presence_penalty": [INF, -INF, NAN, 1e31],
    "frequency_penalty": [INF, NAN],
    "logit_bias": [{1: NAN}, {1: INF}, {-1: 0.0}],
    "seed": [-1, 2**64],
    "stop": [[""], ""],
    "stop_token_ids": [[-1]],
    "ignore_eos": [],
    "show_special": [[-1]],
    "logprobs": [-1, 65],
    "prompt_logprobs": [-1, 65],
    "json_schema": [False, "[]", "true"],
    "regex": [""],
    "grammar": [""],
}
WRONG: dict[str, list[tuple[Any, str]]] = {  # of a wrong type -> what is said of it
    "max_tokens": [("5", "'5' is a str"), (1.0, "1.0 is a float"), (True, "True is a bool"), ([5], "[5] is a list")],
    "min_tokens": [(None, "None is None"), (0.5, "0.5 is a float"), (np.True_, " is a numpy.bool")],
    "temperature": [("hot", "'hot' is a str"), (True, "is a bool"), (1j, "1j is a complex"), (None, "None is None")],
    "top_k": [(2.5, "2.5 is a float"), ("1", "'1' is a str"), (None, "is None")],
    "top_p": [(None, "is None"), (np.array(0.5), "array(0.5) is a numpy.ndarray")],
    "min_p": [(True, "True is a bool"), (b"1", "b'1' is a bytes")],
    "repetition_penalty": [("1", "'1' is a str")],
    "presence_penalty": [("x", "'x' is a str")],
    "frequency_penalty": [(None, "is None"), ({}, "{} is a dict")],
    "logit_bias": [
        ([1], "[1] is a list"),
        ({"a": 1}, "{'a': 1}: 'a' is a str"),
        ({"1": 2.0}, "{'1': 2.0}: '1' is a str"),
        ({1.5: 0.0}, ": 1.5 is a float"),
        ({1: "x"}, ": 'x' is a str"),
        ({1: "-inf"}, ": '-inf' is a str"),
        ({1: np.array([1, 2])}, ": array([1, 2]) is a numpy.ndarray"),
        ({True: 1.0}, ": True is a bool"),
    ],
    "seed": [(1.5, "1.5 is a float"), (True, "True is a bool"), ("1", "'1' is a str")],
    "stop": [
        (5, "5 is an int"),
        ([1], "[1]: 1 is an int"),
        ([b"x"], "[b'x']: b'x' is a bytes"),
        (b"x", "b'x' is a bytes"),
        (["a", None], "['a', None]: None is None"),
        ({"a": 1}, "{'a': 1} is a dict"),
        (np.array("a"), " is a numpy.ndarray"),
    ],
    "stop_token_ids": [
        (5, "5 is an int"),
        ("5", "'5' is a str"),
        (["a"], "['a']: 'a' is a str"),
        ([1.0], "[1.0]: 1.0 is a float"),
        ([True], "[True]: True is a bool"),
        (np.array(5), "array(5) is a numpy.ndarray"),
    ],
    "ignore_eos": [(1, "1 is an int"), (None, "None is None"), ("yes", "'yes' is a str")],
    "show_special": [(1, "1 is an int"), ("<think>", "'<think>' is a str"), ([True], "[True]: True is a bool")],
    "logprobs": [(True, "True is a bool"), (2.0, "2.0 is a float")],
    "prompt_logprobs": [(True, "True is a bool"), (2.0, "2.0 is a float")],
    "json_schema": [(1, "1 is an int"), ([{}], "[{}] is a list"), (b"{}", "b'{}' is a bytes")],
    "regex": [(1, "1 is an int"), (b"a", "b'a' is a bytes"), (["a"], "['a'] is a list")],
    "grammar": [(1, "1 is an int"), ({"a": 1}, "{'a': 1} is a dict")],
}
GOOD: dict[str, list[tuple[Any, Any]]] = {  # given -> as it is kept
    "max_tokens": [(None, None), (0, 0), (10**30, 10**30), (np.int64(5), 5)],
    "min_tokens": [(np.uint8(3), 3), (10**30, 10**30)],
    "temperature": [(0, 0.0), (np.float32(0.5), 0.5), (Fraction(1, 2), 0.5), (1e30, 1e30), (1e-7, 0.0)],
    "top_k": [(0, 0), (10**30, 10**30), (-1, 0), (np.int64(-1), 0)],
    "top_p": [(0, 0.0), (1, 1.0)],
    "min_p": [(1, 1.0)],
    "repetition_penalty": [(1e-6, 1e-6), (1e6, 1e6)],
    "presence_penalty": [(-2, -2.0)],
    "frequency_penalty": [(-2, -2.0)],
    "logit_bias": [({}, {}), (None, {}), ({np.int64(3): np.float32(1)}, {3: 1.0}), ({0: -INF}, {0: -INF})],
    "seed": [(None, None), (0, 0), (2**64 - 1, 2**64 - 1), (np.uint64(2**64 - 1), 2**64 - 1)],
    "stop": [("x", ("x",)), (["x", "yy"], ("x", "yy")), ([], ()), (None, ()), (iter(["a"]), ("a",))],
    "stop_token_ids": [([], ()), (None, ()), ({3}, (3,)), (np.array([3, 4]), (3, 4)), (range(2), (0, 1))],
    "ignore_eos": [(True, True)],
    "show_special": [(True, True), (False, False), (None, ()), ([3, 4], (3, 4)), (np.array([3]), (3,))],
    "logprobs": [(None, None), (0, 0), (64, 64)],
    "prompt_logprobs": [(None, None), (0, 0), (64, 64)],
    "json_schema": [(None, None), (True, {"type": "object"}), ({}, {}), ('{"enum": [1]}', {"enum": [1]})],
    "regex": [(None, None), ("a+", "a+")],
    "grammar": [(None, None), ("start: A", "start: A")],
}


def test_every_parameter_is_covered() -> None:
    assert set(BAD) == set(WRONG) == set(GOOD) == set(PARAMETERS)


def refusal(name: str, value: Any) -> str:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = ")
    assert "it must be " in message
    assert len(message) < 250
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    return message


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=str)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    assert " is out of range; it must be " in refusal(name, value)


@pytest.mark.parametrize(
    ("name", "value", "words"), [(n, *pair) for n, pairs in WRONG.items() for pair in pairs], ids=str
)
def test_wrong_types_are_called_so(name: str, value: Any, words: str) -> None:
    message = refusal(name, value)
    assert f"{words}; it must be " in message
    assert "out of range" not in message


def test_messages_name_what_is_allowed() -> None:
    assert refusal("max_tokens", "5") == "max_tokens = '5' is a str; it must be a whole number >= 0, or None"
    assert refusal("top_p", 2) == "top_p = 2 is out of range; it must be a number from 0 to 1 (1 is off)"


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [(n, *pair) for n, pairs in GOOD.items() for pair in pairs],
    ids=lambda x: str(x).partition(" object at ")[0],  # an address differs between the processes of a run
)
def test_values_are_kept_as_plain_python(name: str, value: Any, kept: Any) -> None:
    found = read_parameter(name, value)
    assert found == kept
    assert type(found) is type(kept)
    if name not in ("min_tokens", "stop"):  # which is more than max_tokens alone; an iterator that was read
        assert getattr(SamplingParams(**{name: value}), name) == kept


def test_max_tokens_is_not_below_min_tokens() -> None:
    for most, least in ((3, 5), (0, 1), (512, 513)):
        with pytest.raises(ParameterError, match=f"^max_tokens = {most} is less than min_tokens = {least}$"):
            SamplingParams(max_tokens=most, min_tokens=least)
    with pytest.raises(ParameterError, match="max_tokens = 512 is less than min_tokens = 600"):
        SamplingParams(min_tokens=600)
    assert SamplingParams(max_tokens=5, min_tokens=5).min_tokens == 5
    assert SamplingParams(max_tokens=None, min_tokens=10**9).max_tokens is None


def test_options_are_the_fields_of_the_parameters() -> None:
    """And response_format, which stands for one of them."""
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    assert list(SamplingOptions.__annotations__) == [*names, "response_format"] == list(OPTIONS)
    hints = typing.get_type_hints(SamplingOptions)
    assert {name: hints[name] for name in names} == typing.get_type_hints(SamplingParams)
    assert SamplingOptions.__required_keys__ == frozenset()


FULL: dict[str, Any] = {
    "max_tokens": None,
    "min_tokens": 2,
    "temperature": 0.1,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": -0.4,
    "frequency_penalty": 0.2,
    "logit_bias": {5: 1.5, 6: -INF},
    "seed": 2**64 - 1,
    "stop": ["a", "\n"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "show_special": [7],
    "logprobs": 3,
    "prompt_logprobs": 2,
    "json_schema": {"enum": ["é", None, {"a": [1.5]}]},
    "regex": None,
    "grammar": None,
}


def test_json_and_back() -> None:
    assert set(FULL) == set(PARAMETERS)
    for params in (SamplingParams(**FULL), SamplingParams()):
        text = json.dumps(params.to_dict(), allow_nan=False)
        assert SamplingParams.from_dict(json.loads(text)) == params
        assert json.loads(text) == params.to_dict()  # plain already: no tuples, and keys are strings
    assert SamplingParams(**FULL).to_dict()["logit_bias"] == {"5": 1.5, "6": "-inf"}
    assert SamplingParams.from_dict({"top_k": 3}) == SamplingParams(top_k=3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"logit_bias": {"a": 1}}, "'a' is a str"),
        ({"logit_bias": {"1": "inf"}}, "'inf' is a str"),
        ({"logit_bias": [1]}, "is a list"),
        ({"topk": 1}, "topk is not a sampling parameter; there are: max_tokens"),
    ]
    for values, words in wrong:
        with pytest.raises(ParameterError, match=words):
            SamplingParams.from_dict(values)
    nothing: Any = None
    with pytest.raises(ParameterError, match="a mapping of names to values, and not None"):
        SamplingParams.from_dict(nothing)


def test_choices_have_seeds_that_follow_one_another() -> None:
    params = SamplingParams(**FULL)
    assert [c.seed for c in params.choices(3)] == [2**64 - 1, 0, 1]
    assert all(dataclasses.replace(c, seed=params.seed) == params for c in params.choices(3))
    first, second = SamplingParams().choices(2)
    assert first.seed is not None
    assert second.seed == first.seed + 1
    assert SamplingParams().choices(1)[0].seed != first.seed


def test_seeds_are_drawn_where_none_is_given() -> None:
    assert SamplingParams(seed=0).with_seed() == 0
    drawn = {SamplingParams().with_seed() for _ in range(4)}
    assert len(drawn) == 4
    assert all(0 <= seed < 2**53 for seed in drawn)  # which a double holds, and so every reader of JSON
    assert max(SamplingParams().with_seed() for _ in range(64)) > 2**40
