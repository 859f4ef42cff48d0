"""Readers of calls that are not JSON: they are read when they are complete, and typed through the tools' schemas."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .brackets import Brackets
from .events import ArgumentsDelta, CallEnds, Event, MalformedCallError, Numbering
from .tools import Tool, plain_json, typed
from .values import GEMMA, PYTHON, Values

__all__ = ["GEMMA_BODY", "PYTHON_BODY", "XML_BODY", "Body", "WholeReader"]

Calls = list[tuple[str, dict[str, Any]]]
_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
_KEYWORD = re.compile(r"[A-Za-z_]\w*")
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Body:
    """A kind of body. begins: the mark it begins with; "": anything. read: the calls of a body; it raises ValueError.

    closing: a regular expression; the body ends with its group 1 where it matches, or before it if it has none. It has
    the end tag at {end}. bracketed: without a start tag it ends where its first bracket is closed.
    """

    begins: str
    closing: str
    read: Callable[[str, Mapping[str, Tool]], Calls]
    bracketed: bool = False


class WholeReader:
    """Reads a body of one kind when its end has come.

    end: the end tag. bare: there is no start tag, so that only known names make it a call.
    """

    def __init__(self, numbering: Numbering, body: Body, tools: Mapping[str, Tool], end: str, bare: bool) -> None:
        self.done = False
        self._numbering, self._body, self._tools, self._bare = numbering, body, tools, bare
        self._closing = None if bare and body.bracketed else re.compile(body.closing.format(end=re.escape(end)))
        self._brackets, self._scanned = Brackets("\"'"), 0

    def read(self, text: str, last: bool) -> tuple[list[Event], int]:
        """See ``CallReader``."""
        begun = text.lstrip()
        if not begun.startswith(self._body.begins[: len(begun)]):
            raise MalformedCallError
        end = self._end(text)
        if end < 0:
            if not last:
                return [], 0
            end = len(text)
        try:
            calls = [(name, plain_json(given)) for name, given in self._body.read(text[:end], self._tools)]
        except (ValueError, RecursionError):
            raise MalformedCallError from None
        if not calls or (self._bare and any(name not in self._tools for name, _ in calls)):
            raise MalformedCallError
        self.done = True
        events: list[Event] = []
        for name, arguments in calls:
            begins = self._numbering.begin(name, "" if events else text[:end])
            events += [begins, ArgumentsDelta(begins.index, arguments, ""), CallEnds(begins.index, "")]
        return events, end

    def _end(self, text: str) -> int:
        """Where the body ends, or -1."""
        if self._closing is not None:
            found = self._closing.search(text)
            return -1 if found is None else found.end(1) if self._closing.groups else found.start()
        end = self._brackets.end(text[self._scanned :])
        end, self._scanned = (self._scanned + end if end >= 0 else -1), len(text)
        return end


def _python(text: str, tools: Mapping[str, Tool]) -> Calls:
    """`[f(a=1), g(b="x")]`, or the calls alone, between commas or on lines of their own."""
    values = Values(text, PYTHON)

    def call() -> tuple[str, dict[str, Any]]:
        name = values.take(_NAME)
        values.expect("(")
        if name is None:
            raise ValueError("no name")
        return name, dict(values.several(")", argument))

    def argument() -> tuple[str, Any]:
        name = values.take(_KEYWORD)
        values.expect("=")
        if name is None:
            raise ValueError("no keyword")
        return name, values.value()

    calls: Calls = []
    if values.next_is("["):
        calls = values.several("]", call)
    while not values.at_end():
        calls.append(call())
        values.next_is(",")
    return calls


def _gemma(text: str, tools: Mapping[str, Tool]) -> Calls:
    """`call:name{key:value,...}`."""
    values = Values(text, GEMMA)
    values.expect("call:")
    name = values.take(_NAME)
    values.expect("{")
    arguments = values.pairs("}", ":")
    if name is None or not values.at_end():
        raise ValueError("no call")
    return [(name, arguments)]


def _xml(text: str, tools: Mapping[str, Tool]) -> Calls:
    """`<function=name><parameter=key>text</parameter></function>`, also several functions."""
    calls: Calls = []
    at = 0
    while at < len(text):
        function = _FUNCTION.match(text, at)
        if function is None:
            raise ValueError("no function")
        at = function.end()
        name, inner = function[1].strip(), function[2]
        calls.append((name, _parameters(inner, tools.get(name))))
    return calls


def _parameters(text: str, tool: Tool | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    at = 0
    while at < len(text):
        parameter = _PARAMETER.match(text, at)
        if parameter is None:
            raise ValueError("no parameter")
        at = parameter.end()
        # The line breaks next to the tags are the form's, not the value's.
        value = parameter[2].removeprefix("\n").removesuffix("\n")
        found[parameter[1].strip()] = typed(value, parameter[1].strip(), tool)
    return found


PYTHON_BODY = Body("", "{end}", _python, bracketed=True)
GEMMA_BODY = Body("call:", "{end}", _gemma)
XML_BODY = Body("<function=", r"(</function>)\s*{end}", _xml)
