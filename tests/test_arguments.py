"""How what a caller gave is described in an error: on one line, and with a type that can be told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.arguments import checked, flag, items, shown, type_of, whole_number
from cuplama.errors import ParameterError


def test_types_in_words() -> None:
    values: list[Any] = ["a", 5, 5.0, True, None, [], {}, ..., np.int64(5), np.zeros(2), len]
    assert {type_of(value) for value in values} == {
        *("a str", "an int", "a float", "a bool", "None", "a list", "a dict", "an ellipsis"),
        *("a numpy.int64", "a numpy.ndarray", "a builtin_function_or_method"),
    }


def test_values_are_shown_on_one_short_line() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert shown([1] * 100) == "[" + "1, " * 25 + "1..."
    assert len(shown([1] * 100)) == 80
    assert shown("x" * 100, 10) == "'xxxxxx..."
    assert shown(10**5000) == "..."  # of which Python makes no text


def test_elements() -> None:
    given: Any
    for given in ([1, 2], (1, 2), {1: 0, 2: 0}.keys(), iter([1, 2]), np.array([1, 2])):
        assert items(given) == (1, 2)
    for given in ("12", b"12", bytearray(b"12"), memoryview(b"12"), {1: 2}, 5, None, np.array(5)):
        with pytest.raises(ParameterError, match=r"^x = .* is (a|an|None) ?\S*; it must be a list$"):
            checked("x", given, items, "a list")


def test_what_a_reader_makes_of_a_value() -> None:
    assert checked("x", np.int8(5), whole_number(5, 5), "5") == 5
    assert checked("x", None, whole_number(5, none=True), "5") is None
    assert checked("x", False, flag, "a flag") is False
    for value, words in ((6, "6 is out of range"), (4, "4 is out of range"), (10**5000, r"\.\.\. is out of range")):
        with pytest.raises(ParameterError, match=f"^x = {words}; it must be 5$"):
            checked("x", value, whole_number(5, 5), "5")
