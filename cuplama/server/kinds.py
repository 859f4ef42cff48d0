"""Kinds of JSON values in a request: the schema of a kind, how it is read, and what it takes in words.

The three are made together from the same bounds, so that ``/openapi.json`` never says other than what is refused. A
reader returns plain Python data, or raises WrongTypeError or ValueError as the readers of ``cuplama.arguments`` do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..arguments import WrongTypeError, flag, in_range, need_type, real, whole_number

__all__ = [
    "ANY_OBJECT",
    "FLAG",
    "Kind",
    "either",
    "integer",
    "json_shown",
    "json_type",
    "listed",
    "messages",
    "nullable",
    "number",
    "record",
    "string",
    "table",
    "word",
]

_HUGE = 1e18
Schema = Mapping[str, Any]
_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (str, "a string"),
    (int, "a number"),
    (float, "a number"),
    (list, "a list"),
    (dict, "an object"),
)


@dataclass(frozen=True)
class Kind:
    """schema: a JSON schema; read: a value of that schema in plain Python data; wanted: what it takes, in words."""

    schema: Schema
    read: Callable[[Any], Any]
    wanted: str


def json_type(value: Any) -> str:
    """The type of a JSON value in words: "a string", "null"."""
    return next((words for kind, words in _TYPES if isinstance(value, kind)), "null")


def json_shown(value: Any, width: int = 80) -> str:
    """A JSON value on one line of at most ``width`` characters, as a client would write it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = "..."
    text = text.encode("utf-8", "backslashreplace").decode()  # half a character cannot be sent back
    return text if len(text) <= width else text[: width - 3] + "..."


def _bounds(low: float, high: float) -> dict[str, float]:
    limits = {"minimum": low, "maximum": high}
    return {name: limit for name, limit in limits.items() if math.isfinite(limit)}


def _in_words(noun: str, low: float, high: float) -> str:
    if low > -_HUGE and high < _HUGE:
        return f"{noun} from {low:.15g} to {high:.15g}"
    return f"{noun} >= {low:g}" if low > -_HUGE else noun


def integer(low: int, high: float = math.inf) -> Kind:
    """Whole numbers. 2.0 is one of them, as in JSON schema: JSON has only one type of numbers."""
    read = whole_number(low, high)

    def whole(value: Any) -> Any:
        return read(int(value) if isinstance(value, float) and value.is_integer() else value)

    return Kind({"type": "integer", **_bounds(low, high)}, whole, _in_words("a whole number", low, high))


def number(low: float = -1e30, high: float = 1e30) -> Kind:
    """Numbers. Bounds beyond 10^18 are in the schema, and not worth telling."""
    return Kind({"type": "number", **_bounds(low, high)}, real(low, high), _in_words("a number", low, high))


def string(least: int = 0, most: int | None = None) -> Kind:
    """Strings of ``least`` to ``most`` characters."""

    def read(value: Any) -> str:
        need_type(isinstance(value, str), value)
        in_range(least <= len(value) and (most is None or len(value) <= most))
        return str(value)

    length = {"minLength": least or None, "maxLength": most}
    wanted = "a non-empty string" if least else "a string"
    limits = {name: limit for name, limit in length.items() if limit is not None}
    return Kind(
        {"type": "string", **limits}, read, wanted if most is None else f"{wanted} of at most {most} characters"
    )


def word(*words: str) -> Kind:
    """One of some strings."""

    def read(value: Any) -> str:
        need_type(isinstance(value, str), value)
        in_range(value in words)
        return str(value)

    return Kind({"type": "string", "enum": list(words)}, read, "one of " + ", ".join(f'"{w}"' for w in words))


def listed(kind: Kind, nouns: str, least: int = 0, most: int | None = None) -> Kind:
    """Lists of one kind. nouns: what it is a list of."""

    def read(value: Any) -> list[Any]:
        need_type(isinstance(value, list), value)
        in_range(least <= len(value) and (most is None or len(value) <= most))
        return [kind.read(item) for item in value]

    length = {"minItems": least or None, "maxItems": most}
    limits = {name: limit for name, limit in length.items() if limit is not None}
    wanted = f"a {'non-empty ' if least else ''}list of {'' if most is None else f'at most {most} '}{nouns}"
    return Kind({"type": "array", "items": kind.schema, **limits}, read, wanted)


def messages(kind: Kind) -> Kind:
    """The messages of a chat, which are of that kind; what is inside is checked where the template's form is known."""
    return replace(listed(kind, "messages", 1), read=listed(ANY_OBJECT, "messages", 1).read)


def table(kind: Kind, key: Callable[[str], Any], pattern: str, wanted: str) -> Kind:
    """Objects whose values are of one kind. key: reads a name that matches the regular expression ``pattern``."""

    def read(value: Any) -> dict[Any, Any]:
        need_type(isinstance(value, dict), value)
        in_range(all(re.search(pattern, name) for name in value))
        return {key(name): kind.read(item) for name, item in value.items()}

    names = {"pattern": pattern}
    return Kind({"type": "object", "propertyNames": names, "additionalProperties": kind.schema}, read, wanted)


def record(parts: Mapping[str, Kind], required: Sequence[str] = ()) -> Kind:
    """Objects with named parts, of which null counts as absent. Further ones are kept as they are."""

    def read(value: Any) -> dict[str, Any]:
        need_type(isinstance(value, dict), value)
        given = {name: item for name, item in value.items() if item is not None}
        in_range(all(name in given for name in required))
        return {name: parts[name].read(item) if name in parts else item for name, item in given.items()}

    properties = {name: kind.schema if name in required else nullable(kind.schema) for name, kind in parts.items()}
    said = ", ".join(f'"{name}" ({kind.wanted})' for name, kind in parts.items())
    more = {"required": list(required)} if required else {}
    return Kind({"type": "object", "properties": properties, **more}, read, f"an object with {said}")


def either(*kinds: Kind) -> Kind:
    """Values of one of several kinds, of which the first that takes a value reads it."""

    def read(value: Any) -> Any:
        wrong: list[WrongTypeError] = []
        in_bounds = True
        for kind in kinds:
            try:
                return kind.read(value)
            except WrongTypeError as error:
                wrong.append(error)
            except ValueError:
                in_bounds = False
        if not in_bounds:
            raise ValueError
        raise next((e for e in wrong if e.item is not value), wrong[0])

    return Kind({"anyOf": [kind.schema for kind in kinds]}, read, " or ".join(kind.wanted for kind in kinds))


def nullable(schema: Schema) -> Schema:
    """The schema of the same values and null."""
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema


def _read_object(value: Any) -> dict[str, Any]:
    need_type(isinstance(value, dict), value)
    return dict(value)


FLAG = Kind({"type": "boolean"}, flag, "true or false")
ANY_OBJECT = Kind({"type": "object"}, _read_object, "an object")
