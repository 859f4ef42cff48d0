"""The tools of a request, and values that are typed through their schemas."""

from __future__ import annotations

from typing import Any

import pytest

from cuplama.errors import ParameterError
from cuplama.text.tool_calls.tools import Tool, plain_json, read_tools, typed, types_of


def test_both_ways_to_write_a_tool() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    nested = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    assert read_tools([nested, {"name": "g"}]) == {"f": Tool("f", schema, True), "g": Tool("g")}
    assert read_tools(None) == {}
    assert read_tools([{"name": "g", "parameters": None, "strict": None}]) == {"g": Tool("g")}


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([{"function": {}}], r"tools\[0\] = .* must be a function with a name"),
        ([5], r"tools\[0\] = 5: it must be"),
        ([{"name": "f"}, {"name": "f"}], r"tools\[1\]: there are two tools named f"),
        ([{"name": "f", "parameters": [1]}], r"tools\[0\] \(f\): parameters = \[1\] must be a JSON schema"),
    ],
)
def test_what_is_no_tool(tools: Any, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        read_tools(tools)


TYPED: list[tuple[Any, str, Any]] = [
    ({"type": "string"}, "12", "12"),
    ({}, "12", "12"),
    ({"type": "integer"}, "12", 12),
    ({"type": "integer"}, "1.5", "1.5"),
    ({"type": "number"}, "1.5", 1.5),
    ({"type": "number"}, "12", 12),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "false", False),
    ({"type": "integer"}, "true", "true"),
    ({"type": "array"}, "[1, 2]", [1, 2]),
    ({"type": "object"}, '{"a": null}', {"a": None}),
    ({"type": "object"}, "{broken", "{broken"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "null"]}, "None", None),
    ({"type": ["string", "null"]}, "nil", "nil"),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", 3),
    ({"enum": [1, 2]}, "2", 2),
    ({"const": "2"}, "2", "2"),
    ({"$ref": "#/$defs/count"}, "2", 2),
    ({"$ref": "#/$defs/loop"}, "2", "2"),
    ({"$ref": "#/nowhere"}, "2", "2"),
    ("no schema", "2", "2"),
]


@pytest.mark.parametrize(("schema", "text", "value"), TYPED)
def test_text_becomes_what_the_schema_allows(schema: Any, text: str, value: Any) -> None:
    defs = {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}
    found = typed(text, "p", Tool("f", {"properties": {"p": schema}, "$defs": defs}))
    assert found == value
    assert type(found) is type(value)


def test_parameters_that_nobody_knows_are_text() -> None:
    assert (
        typed("12", "p", None) == typed("12", "p", Tool("f")) == typed("12", "p", Tool("f", {"properties": 5})) == "12"
    )
    assert types_of({"enum": [True, None, "x", 1.5]}, {}) == {"boolean", "null", "string", "number"}


def test_json_that_can_be_sent() -> None:
    assert plain_json({"é": [1, None]}) == '{"é": [1, null]}'
    for value in (float("inf"), float("nan"), "\ud800"):
        with pytest.raises(ValueError):
            plain_json(value)
