"""What the grammar of a call is in each kind of body."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .lark import Lark
from .tools import Tool, types_of

__all__ = ["BODIES"]

Parameter = tuple[str, Mapping[str, Any], bool]  # name, schema, whether it must be there
_QUOTE = '<|"|>'  # around Gemma's strings
_SINGLE_QUOTED = r"/'(?:[^'\\\n]|\\[^\n])*'/"
_SAYS_NOTHING = {
    "type",
    "title",
    "description",
    "default",
    "examples",
    "$defs",
    "definitions",
}  # of what a string may be
_DEEPEST = 8  # brackets of Gemma's values inside one another; deeper ones may hold anything


def _object(key: str) -> Callable[[Lark, Tool, str], str]:
    """`{"name": "f", KEY: {...}}`."""

    def body(lark: Lark, tool: Tool, written: str) -> str:
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
        return lark.rule(f'{lark.text(head)} {_arguments(lark, tool)} "}}"')

    return body


def _named(lark: Lark, tool: Tool, written: str) -> str:
    """`name{...}`, with what is written between them."""
    return lark.rule(f"{lark.text(tool.name + written)} {_arguments(lark, tool)}")


def _arguments(lark: Lark, tool: Tool) -> str:
    return lark.json({"type": "object", **tool.parameters}, lenient=not tool.strict)


def _python(lark: Lark, tool: Tool, written: str) -> str:
    """`f(a=1, b="x")`. JSON's strings, lists and objects are Python's; its words are read as well."""
    given = [
        (f"{lark.text(f'{name}=')} {_python_value(lark, schema, tool)}", needed)
        for name, schema, needed in _parameters(tool)
    ]
    return lark.rule(f'{lark.text(f"{tool.name}(")} {lark.in_order(given, lark.text(", "))} ")"')


def _python_value(lark: Lark, schema: Mapping[str, Any], tool: Tool) -> str:
    types, value = types_of(schema, tool.parameters), lark.json(schema, lenient=not tool.strict)
    if types == {"boolean"}:
        return '("True" | "False" | "true" | "false")'
    if types == {"string"} and (choices := [v for v in schema.get("enum", ()) if isinstance(v, str)]):
        return lark.one_of([value, *(lark.text(repr(choice)) for choice in choices)])
    if types == {"string"} and schema.keys() <= _SAYS_NOTHING:
        return lark.one_of([value, _SINGLE_QUOTED])
    return value


def _xml(lark: Lark, tool: Tool, written: str) -> str:
    """`<function=f>`, a parameter a line, `</function>`."""
    end = "</parameter>"
    lines = []
    for name, schema, needed in _parameters(tool):
        texts = types_of(schema, tool.parameters) <= {"string"}
        choices = [v for v in schema.get("enum", ()) if isinstance(v, str)] if texts else []
        if texts and not choices:
            value = lark.up_to(end)
        else:
            value = lark.one_of(map(lark.text, choices)) if choices else lark.json(schema, lenient=not tool.strict)
            value = f'"\\n"? {value} "\\n"? {lark.text(end)}'
        line = f"{lark.text(f'<parameter={name}>')} {value} BLANK?"
        lines.append(lark.rule(line) + ("" if needed else "?"))
    return lark.rule(" ".join([lark.text(f"<function={tool.name}>"), "BLANK?", *lines, lark.text("</function>")]))


def _gemma(lark: Lark, tool: Tool, written: str) -> str:
    """`call:f{a:1,b:<|"|>x<|"|>}`."""
    return lark.rule(f"{lark.text(f'call:{tool.name}')} {_gemma_object(lark, tool.parameters, tool, _DEEPEST)}")


def _gemma_object(lark: Lark, schema: Mapping[str, Any], tool: Tool, depth: int) -> str:
    pairs = [
        (f"{lark.text(f'{name}:')} {_gemma_value(lark, inner, tool, depth - 1)}", needed)
        for name, inner, needed in _properties(schema, tool)
    ]
    return f'"{{" {lark.in_order(pairs, lark.text(","))} "}}"'


def _gemma_value(lark: Lark, schema: Mapping[str, Any], tool: Tool, depth: int) -> str:
    types, quote = types_of(schema, tool.parameters), lark.text(_QUOTE)
    if types == {"string"} and (choices := [v for v in schema.get("enum", ()) if isinstance(v, str)]):
        return f"{quote} {lark.one_of(map(lark.text, choices))} {quote}"
    if types == {"string"}:
        return f"{quote} {lark.up_to(_QUOTE)}"
    if types == {"array"} and depth and isinstance(schema.get("items"), Mapping):
        item = lark.rule(_gemma_value(lark, {**_shared(tool), **schema["items"]}, tool, depth - 1))
        return f'"[" ({lark.between(item, lark.text(","), several=True)})? "]"'
    if types == {"object"} and depth and schema.get("properties"):
        return _gemma_object(lark, schema, tool, depth)
    if types and not types & {"string", "array", "object"}:
        return lark.json(schema, lenient=not tool.strict)
    return _gemma_anything(lark)


def _gemma_anything(lark: Lark) -> str:
    """Any value: of a schema that says nothing, or says it in a way of JSON's own."""
    quote = f"{lark.text(_QUOTE)} {lark.up_to(_QUOTE)}"
    scalar = lark.json({"type": ["number", "boolean", "null"]}, lenient=True)
    value = lark.rule(f"{quote} | {scalar}")
    pair = lark.rule(f'/[^\\s:{{}}\\[\\],<]+/ ":" {value}')
    return lark.one_of(
        [
            value,
            f'"[" ({lark.between(value, lark.text(","), several=True)})? "]"',
            f'"{{" ({lark.between(pair, lark.text(","), several=True)})? "}}"',
        ]
    )


def _parameters(tool: Tool) -> list[Parameter]:
    return list(_properties(tool.parameters, tool))


def _properties(schema: Mapping[str, Any], tool: Tool) -> Iterator[Parameter]:
    """The properties of an object. Each has the definitions that its references may mean."""
    required, properties = schema.get("required", ()), schema.get("properties")
    shared = _shared(tool)
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        yield name, {**shared, **(inner if isinstance(inner, Mapping) else {})}, name in required


def _shared(tool: Tool) -> dict[str, Any]:
    return {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}


# Kind of body -> the grammar of one call. What stands between a name and its arguments is the third argument.
BODIES: Mapping[str, Callable[[Lark, Tool, str], str]] = {
    "json": _object("arguments"),
    "json list": _object("arguments"),
    "json parameters": _object("parameters"),
    "named": _named,
    "python": _python,
    "python lines": _python,
    "gemma": _gemma,
    "xml": _xml,
}
