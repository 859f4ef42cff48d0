"""What an answer is split into while it streams."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Protocol

__all__ = [
    "ArgumentsDelta",
    "CallBegins",
    "CallEnds",
    "CallReader",
    "ContentDelta",
    "Event",
    "MalformedCallError",
    "Numbering",
    "ReasoningDelta",
    "Skipped",
]


@dataclass(frozen=True)
class ContentDelta:
    """More of the content. source, of every event: what the model wrote for it; all sources joined are its text."""

    text: str
    source: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str
    source: str


@dataclass(frozen=True)
class CallBegins:
    """A tool is called. index: 0 for the first call of the answer, then 1, ..."""

    index: int
    id: str
    name: str
    source: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments: JSON text, which is an object when the call has ended, unless the model erred."""

    index: int
    text: str
    source: str


@dataclass(frozen=True)
class CallEnds:
    """No more arguments of this call."""

    index: int
    source: str


@dataclass(frozen=True)
class Skipped:
    """A tag, with the blanks around it: nothing that anybody is shown."""

    source: str


Event = ContentDelta | ReasoningDelta | CallBegins | ArgumentsDelta | CallEnds | Skipped


class MalformedCallError(ValueError):
    """What follows a start tag is no call: it is content."""


@dataclass
class Numbering:
    """Gives the calls of one answer their indices and ids. short_ids: nine letters, which Mistral's templates want."""

    short_ids: bool = False
    count: int = field(default=0, init=False)

    def begin(self, name: str, source: str) -> CallBegins:
        """The next call."""
        id = os.urandom(5).hex()[:9] if self.short_ids else f"call_{os.urandom(12).hex()}"
        self.count += 1
        return CallBegins(self.count - 1, id, name, source)


class CallReader(Protocol):
    """Reads what follows a start tag, up to the end tag. done: it takes nothing more."""

    done: bool

    def read(self, text: str, last: bool) -> tuple[list[Event], int]:
        """(what is certain, the characters of ``text`` that this stands for). The rest is given again, with more.

        last: nothing more will come. Raises MalformedCallError if no call begins here.
        """
        ...
