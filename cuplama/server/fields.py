"""The fields of a request as data: from one table come the check of a request and its schema in ``/openapi.json``.

A field becomes a sampling parameter, an option of the chat (what reaches the template), or a setting of the endpoint's
own. Null counts as absent, as OpenAI's clients send it. A field that the engine cannot honour is refused by name unless
its value asks for nothing. A field that nobody knows is left out, as other servers do with what clients of theirs send;
``Read.unknown`` has the names for the log. But what is nearly the name of a field is an error in writing, and refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arguments import WrongTypeError
from .errors import ApiError
from .kinds import Kind, json_shown, json_type, nullable

__all__ = ["Field", "Fields", "Read", "chat", "harmless", "own", "refused", "sampling"]

_ALIKE = 0.88  # "temprature" is that close to "temperature", and "max_new_tokens" is not to "max_tokens"


@dataclass(frozen=True)
class Field:
    """One field of a request.

    name, kind: as in the JSON; doc: a sentence for OpenAPI; goes: "sampling", "chat" or "own", where the value is kept
    under ``to``, or "" for one that changes nothing here; default: of an own setting that is absent; required: null
    does not count as absent then. neutral: of a field that is not supported, the values that ask for nothing; None
    for a field that is.
    """

    name: str
    kind: Kind
    doc: str = ""
    goes: str = ""
    to: str = ""
    default: Any = None
    required: bool = False
    neutral: tuple[Any, ...] | None = None

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of its value."""
        schema = dict(self.kind.schema if self.required else nullable(self.kind.schema))
        if self.default is not None:
            schema["default"] = self.default
        return {**schema, "description": self.doc} if self.doc else schema

    def read(self, value: Any) -> Any:
        """The value in plain Python data. Raises ApiError 400 that names field, value and what is allowed."""
        try:
            return self.kind.read(value)
        except WrongTypeError as error:
            inside = "" if error.item is value else f": {json_shown(error.item, 40)}"
            said = f"{inside} is {json_type(error.item)}; it must be {self.kind.wanted}"
        except (ValueError, OverflowError):
            said = f" is out of range; it must be {self.kind.wanted}"
        if self.neutral is not None:
            said = f" is not supported; {self.doc}"
        raise ApiError(400, f"{self.name} = {json_shown(value)}{said}", param=self.name)


def sampling(name: str, kind: Kind, doc: str = "", to: str = "", default: Any = None) -> Field:
    """A field that becomes a sampling parameter, of the same name unless ``to`` is another."""
    return Field(name, kind, doc, "sampling", to or name, default)


def chat(name: str, kind: Kind, doc: str = "", to: str = "") -> Field:
    """A field that becomes an option of ``Model.chat``: what reaches the template, and how the prompt ends."""
    return Field(name, kind, doc, "chat", to or name)


def own(name: str, kind: Kind, doc: str = "", default: Any = None, required: bool = False) -> Field:
    """A setting of the endpoint's own."""
    return Field(name, kind, doc, "own", name, default, required)


def harmless(name: str, kind: Kind, doc: str = "") -> Field:
    """A field that changes nothing in what is generated here."""
    return Field(name, kind, doc)


def refused(name: str, instead: str, *neutral: Any) -> Field:
    """A field that is not supported. neutral: values, besides null, that ask for nothing; instead: what to do."""

    def read(value: Any) -> Any:
        if not any(type(value) is type(n) and value == n for n in neutral):
            raise ValueError
        return value

    return Field(name, Kind({"enum": list(neutral)}, read, ""), instead, neutral=neutral)


@dataclass
class Read:
    """What a request says: sampling parameters, options of the chat, own settings (all of them, absent ones by their
    default), and the names of fields that nobody knows."""

    sampling: dict[str, Any] = field(default_factory=dict)
    chat: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fields:
    """The fields of an endpoint. Of two that become the same, the later one counts."""

    fields: Sequence[Field]

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the request's body."""
        required = [f.name for f in self.fields if f.required]
        properties = {f.name: f.schema for f in self.fields}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": True}

    def read(self, body: Mapping[str, Any]) -> Read:
        """What a body says. Raises ApiError 400 for the first field that is wrong, missing, or refused."""
        read = Read(own={f.to: f.default for f in self.fields if f.goes == "own"})
        kept = {"sampling": read.sampling, "chat": read.chat, "own": read.own}
        for f in self.fields:
            value = body.get(f.name)
            if f.required and f.name not in body:
                raise ApiError(400, f"{f.name} is missing; it must be {f.kind.wanted}", param=f.name)
            if value is None and not f.required:
                continue
            value = f.read(value)
            if f.goes:
                kept[f.goes][f.to] = value
        read.unknown = self._unknown(body)
        return read

    def _unknown(self, body: Mapping[str, Any]) -> list[str]:
        names = {f.name for f in self.fields}
        unknown = [name for name in body if name not in names]
        for name in unknown:
            near = difflib.get_close_matches(name.lower()[:64], names, n=1, cutoff=_ALIKE)
            if near and body[name] is not None:
                said = json_shown(name)
                raise ApiError(400, f"{said} is no field of this request; did you mean {near[0]}?", param=said[1:-1])
        return unknown
