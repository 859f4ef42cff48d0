"""Readers of calls whose arguments are JSON: they pass the arguments on while the model writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from copy import copy

from .brackets import Brackets
from .events import ArgumentsDelta, CallEnds, Event, MalformedCallError, Numbering, Skipped
from .tools import plain_json

__all__ = ["JsonReader", "NamedReader"]

# The usual beginning of a call as an object: as soon as it is there, the arguments can be passed on as they come.
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
    r"(?=\{)"
)
_LONGEST_HEAD = 300  # characters: names have at most 64

_Step = tuple[list[Event], int] | None  # events, the characters they stand for; None: more text is needed


class _Streaming:
    """What both readers have in common: states that read one after the other, and arguments that are passed on."""

    def __init__(self, numbering: Numbering, first: Callable[[str, bool], _Step]) -> None:
        self.done = False
        self._numbering, self._state = numbering, first
        self._brackets = Brackets()

    def read(self, text: str, last: bool) -> tuple[list[Event], int]:
        """See ``CallReader``."""
        events: list[Event] = []
        used = 0
        while not self.done:
            step = self._state(text[used:], last)
            if step is None:
                break
            events += step[0]
            used += step[1]
        return events, used

    def _begin(self, name: str, source: str) -> _Step:
        self._brackets, self._state = Brackets(), self._arguments
        return [self._numbering.begin(name, source)], len(source)

    def _arguments(self, text: str, last: bool) -> _Step:
        """Inside the arguments. A text that ends here leaves them incomplete."""
        if not text and not last:
            return None
        before, end = copy(self._brackets), self._brackets.end(text)
        part = text if end < 0 else text[:end]
        events: list[Event] = [ArgumentsDelta(self._call, before.escaped(part), part)] if part else []
        if end >= 0:
            self._state = self._tail
        elif last:
            events.append(CallEnds(self._call, ""))
            self.done = True
        return events, len(part)

    @property
    def _call(self) -> int:
        return self._numbering.count - 1

    def _tail(self, text: str, last: bool) -> _Step:
        """After the arguments."""
        raise NotImplementedError


class JsonReader(_Streaming):
    """`{"name": ..., "arguments": {...}}`, also with "parameters": alone, one after the other, or in a list.

    names: of the tools, where a call of any other is none; None: any name will do.
    """

    def __init__(self, numbering: Numbering, names: Collection[str] | None = None) -> None:
        super().__init__(numbering, self._item)
        self._names = names
        self._before = numbering.count
        self._listed = False
        self._scanned = 0  # characters of an unusual object in which its end is not

    def _item(self, text: str, last: bool) -> _Step:
        """Before an object, or at the end of them."""
        first = self._numbering.count == self._before
        separator = r"\s*\[?\s*" if first else r"\s*,?\s*" if self._listed else r"\s*[,;]?\s*"
        found = re.match(separator, text)
        assert found is not None
        self._listed = self._listed or "[" in found[0]
        at = found.end()
        if at == len(text):
            return self._finish(text) if last else None
        if text[at] != "{":
            return self._finish(text)
        if (head := _HEAD.match(text, at)) is not None:
            name = self._name(head[1])
            return self._finish(text) if name is None else self._begin(name, text[: head.end()])
        return self._whole(text, at, last)

    def _whole(self, text: str, at: int, last: bool) -> _Step:
        """An object whose keys stand in another order, or that is no call: read when it is complete."""
        if not self._scanned:
            self._brackets, self._scanned = Brackets(), at
        end = self._brackets.end(text[self._scanned :])
        if end < 0:
            self._scanned = len(text)
            return self._finish(text) if last else None
        end, self._scanned = self._scanned + end, 0
        call = self._call_of(text[at:end])
        if call is None:
            return self._finish(text)
        begins = self._numbering.begin(call[0], text[:end])
        return [begins, ArgumentsDelta(begins.index, call[1], ""), CallEnds(begins.index, "")], end

    def _call_of(self, text: str) -> tuple[str, str] | None:
        """(name, arguments) of an object, whose arguments may be a string of JSON, or missing."""
        try:
            value = json.loads(text, strict=False)
            name = self._name(value.get("name"))
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = json.loads(arguments, strict=False)
            if name is None or not isinstance(arguments, dict):
                return None
            return name, plain_json(arguments)
        except (ValueError, RecursionError):
            return None

    def _name(self, name: object) -> str | None:
        """A name that may be called."""
        known = isinstance(name, str) and name and (self._names is None or name in self._names)
        return str(name) if known else None

    def _tail(self, text: str, last: bool) -> _Step:
        """Between the arguments and the end of their object, which models forget sometimes."""
        stripped = text.lstrip()
        if not stripped and not last:
            return None
        if stripped[:1] not in ("}", ","):
            self.done = True
            return [CallEnds(self._call, "")], 0
        end = Brackets(depth=1).end(text)
        if end < 0 and not last:
            return None
        source = text if end < 0 else text[:end]
        self._state = self._item
        return [CallEnds(self._call, source)], len(source)

    def _finish(self, text: str) -> _Step:
        """No further object: the end of the list, if there is one, is all that still belongs to the calls."""
        if self._numbering.count == self._before:
            raise MalformedCallError
        self.done = True
        end = re.match(r"\s*\]", text) if self._listed else None
        return ([Skipped(end[0])], end.end()) if end else ([], 0)


class NamedReader(_Streaming):
    """`name{...}`. separator: a regular expression of what stands between name and arguments."""

    def __init__(self, numbering: Numbering, separator: str) -> None:
        super().__init__(numbering, self._head)
        self._pattern = re.compile(rf"\s*([\w.\-]+){separator}(?=\{{)")

    def _head(self, text: str, last: bool) -> _Step:
        found = self._pattern.match(text[:_LONGEST_HEAD])
        if found is not None:
            return self._begin(found[1], found[0])
        if last or len(text) >= _LONGEST_HEAD:
            raise MalformedCallError
        return None

    def _tail(self, text: str, last: bool) -> _Step:
        self.done = True
        return [CallEnds(self._call, "")], 0
