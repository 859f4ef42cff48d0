"""Values as Python and Gemma write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuplama.text.tool_calls.values import GEMMA, PYTHON, Values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_what_python_prints_is_read_back(value: Any) -> None:
    found = Values(repr(value), PYTHON)
    assert found.value() == value
    assert found.at_end()


READ: list[tuple[str, Any]] = [
    (r'"\ud83d\ude00 \x41 \U0001F600 \n\q"', "😀 A 😀 \n\\q"),
    ("'it\\'s'", "it's"),
    ("[true, false, null, None,]", [True, False, None, None]),
    ('{"a": -1.5e3, }', {"a": -1500.0}),
    ("+3", 3),
]


@pytest.mark.parametrize(("text", "value"), READ)
def test_notations_that_models_mix(text: str, value: Any) -> None:
    assert Values(text, PYTHON).value() == value


GEMMAS: list[tuple[str, Any]] = [
    ('<|"|>a "b" {c}<|"|>', 'a "b" {c}'),
    ('{a:1,<|"|>b c<|"|>:[true,null,<|"|>x<|"|>],d:{}}', {"a": 1, "b c": [True, None, "x"], "d": {}}),
]


@pytest.mark.parametrize(("text", "value"), GEMMAS)
def test_gemmas_values(text: str, value: Any) -> None:
    assert Values(text, GEMMA).value() == value


@pytest.mark.parametrize("text", ["", "[1", "{1: 2}", "maybe", "[" * 200, "'a", "{'a' 1}", '"\\U00110000"'])
def test_what_is_no_value(text: str) -> None:
    with pytest.raises(ValueError):
        Values(text, PYTHON).value()
