"""The tools of a request: their names, and the JSON schemas of their parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...arguments import shown
from ...errors import ParameterError

__all__ = ["Tool", "plain_json", "read_tools", "typed", "types_of"]

_KINDS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (bool, ("boolean",)),
    (int, ("integer", "number")),
    (float, ("number",)),
    (str, ("string",)),
    (list, ("array",)),
    (dict, ("object",)),
    (type(None), ("null",)),
)
_WORDS = {"True": True, "False": False, "None": None}
_DEEPEST = 20  # references and alternatives inside one another


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: a JSON schema. strict: arguments must follow it."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def schema_of(self, parameter: str) -> Mapping[str, Any]:
        """The schema of one parameter; {}: nothing is known of it."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Tool]:
    """Name -> tool, from a list as OpenAI's clients write it, or of the functions alone. Raises ParameterError."""
    found: dict[str, Tool] = {}
    for i, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ParameterError(f"tools[{i}] = {shown(tool)}: it must be a function with a name")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ParameterError(f"tools[{i}] ({name}): parameters = {shown(parameters)} must be a JSON schema")
        if name in found:
            raise ParameterError(f"tools[{i}]: there are two tools named {name}")
        found[name] = Tool(name, parameters, function.get("strict") is True)
    return found


def plain_json(value: Any) -> str:
    """JSON text that every reader takes and that can be sent. Raises ValueError for what has none (infinity)."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # half a character
    return text


def typed(text: str, parameter: str, tool: Tool | None) -> Any:
    """The value of a parameter that the model wrote without quotes: text, unless its schema says otherwise."""
    allowed = set() if tool is None else types_of(tool.schema_of(parameter), tool.parameters)
    if allowed <= {"string"}:
        return text
    try:
        value = _WORDS[text.strip()] if text.strip() in _WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text
    kinds = next(kinds for kind, kinds in _KINDS if isinstance(value, kind))
    return value if allowed.intersection(kinds) and "string" not in kinds else text


def types_of(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema allows; empty where it does not say. root: where its references begin."""
    return set(_types(schema, root, _DEEPEST))


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or not depth:
        return
    said = schema.get("type", ())
    yield from [said] if isinstance(said, str) else said
    for value in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]:
        yield from next((kinds for kind, kinds in _KINDS if isinstance(value, kind)), ())
    for several in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(several, ()):
            yield from _types(one, root, depth - 1)
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        found: Any = root
        for key in reference[2:].split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        yield from _types(found, root, depth - 1)
