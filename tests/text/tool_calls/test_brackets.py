"""The bracket that closes a text, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cuplama.text.tool_calls.brackets import Brackets
from tests.text.tool_calls.test_values import JSON


@given(
    value=st.lists(JSON, max_size=3) | st.dictionaries(st.text(), JSON, max_size=3), rest=st.text(), cut=st.integers(0)
)
def test_json_ends_where_it_ends(value: Any, rest: str, cut: int) -> None:
    text = json.dumps(value)
    assert Brackets().end(text + rest) == len(text)
    at = cut % len(text)
    halves = Brackets()
    assert halves.end(text[:at]) == -1
    assert halves.end(text[at:] + rest) == len(text) - at


def test_strings_of_python() -> None:
    assert Brackets("\"'").end("[f(a=']')] x") == 10
    assert Brackets().end("[f(a=']')] x") == 9  # in JSON that is no string
    assert Brackets(depth=1).end(', "x": {}} y') == 10
    assert Brackets().end('{"a": "\\') == -1


@given(text=st.text(st.sampled_from('a\n\t\x01"\\{}: ,'), max_size=12), cut=st.integers(0))
def test_control_characters_in_strings_become_json(text: str, cut: int) -> None:
    value = {"k": text}
    raw = json.dumps(value).replace("\\n", "\n").replace("\\t", "\t").replace("\\u0001", "\x01")
    if json.loads(raw, strict=False) != value:
        return  # the text has a backslash of its own before one of these letters
    at = cut % len(raw)
    brackets = Brackets()
    found = brackets.escaped(raw[:at])
    assert brackets.end(raw[:at]) == -1
    found += brackets.escaped(raw[at:])
    assert json.loads(found) == value
    assert Brackets().escaped('{\n"a": 1}') == '{\n"a": 1}'
