"""An answer as blocks, one after the other: reasoning, text, calls. The APIs after chat completions have it so.

A writer says what the blocks look like in its API; here they are made of what the model writes, whole or as a stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ..completion import Completion, Delta
from ..text.splitter import ArgumentsDelta, CallBegins, CallEnds, ContentDelta, Event, ReasoningDelta
from .errors import ApiError
from .fields import Read
from .generating import Asked, Running
from .service import Service
from .split_text import SplitText
from .sse import EventStream, event

__all__ = ["Block", "Blocks", "Happening", "Named", "Step", "Writer", "answer_in_blocks"]

Happening = Literal["begins", "goes on", "ends"]
Named = dict[str, Any]  # the data of an event, whose "type" is its name


@dataclass
class Block:
    """kind: "reasoning", "text" or "call"; index: its place in the answer; name, call: of a call, call is its id."""

    kind: str
    index: int
    name: str = ""
    call: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far; of a call the arguments."""
        return "".join(self.parts)


@dataclass(frozen=True)
class Step:
    """What has happened to a block. text: what was added to it."""

    block: Block
    happening: Happening
    text: str = ""


class Blocks:
    """Makes blocks of the deltas of one answer. split: says what they are; blocks: those that have begun."""

    def __init__(self, split: SplitText) -> None:
        self.split = split
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def push(self, deltas: Iterable[Delta]) -> list[Step]:
        """What deltas do to the blocks."""
        return self._steps(self.split.push(deltas))

    def end(self) -> list[Step]:
        """What was held back, and the end of the last block. An answer has one block at least."""
        steps = self._steps(self.split.push([], last=True))
        if not self.blocks:
            steps += self._begin("text")
        return steps + self._close()

    def _steps(self, events: Sequence[Event]) -> list[Step]:
        steps: list[Step] = []
        for new in events:
            if isinstance(new, ContentDelta):
                steps += self._add("text", new.text)
            elif isinstance(new, ReasoningDelta):
                steps += self._add("reasoning", new.text)
            elif isinstance(new, (CallBegins, ArgumentsDelta, CallEnds)):
                steps += self._call(new)
        return steps

    def _call(self, new: CallBegins | ArgumentsDelta | CallEnds) -> list[Step]:
        if isinstance(new, CallBegins):
            return self._begin("call", new.name, new.id)
        return self._close() if isinstance(new, CallEnds) else self._add("call", new.text)

    def _add(self, kind: str, text: str) -> list[Step]:
        steps = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        assert self._open is not None
        self._open.parts.append(text)
        return [*steps, Step(self._open, "goes on", text)]

    def _begin(self, kind: str, name: str = "", call: str = "") -> list[Step]:
        steps = self._close()
        self._open = Block(kind, len(self.blocks), name, call)
        self.blocks.append(self._open)
        return [*steps, Step(self._open, "begins")]

    def _close(self) -> list[Step]:
        steps = [] if self._open is None else [Step(self._open, "ends")]
        self._open = None
        return steps


class Writer(Protocol):
    """How an API writes an answer. It belongs to one request."""

    blocks: Blocks

    def begin(self, completion: Completion) -> list[Named]:
        """The events before the first block."""
        ...

    def step(self, step: Step) -> list[Named]:
        """The events for what happens to a block."""
        ...

    def end(self, completion: Completion) -> list[Named]:
        """The events after the last block."""
        ...

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The whole answer, when it has come to its end."""
        ...

    def failed(self, error: ApiError) -> list[Named]:
        """The events of an error in the middle of a stream."""
        ...


async def answer_in_blocks(service: Service, request: Request, read: Read, asked: Asked, writer: Writer) -> Response:
    """Generate, and answer as the writer has it. Raises what the generation raises before anything is sent."""
    if read.unknown:
        request.state.meter.fields["ignored_fields"] = read.unknown[:16]
    running = Running(service, request, asked)
    if read.own["stream"]:
        return EventStream(_events(running, writer), running.close)
    try:
        async for deltas in running.seldom():
            writer.blocks.push(deltas)
        writer.blocks.end()
        whole = writer.whole(running.completions[0])
    finally:
        await running.close()
    return Response(json.dumps(whole), media_type="application/json")  # ASCII: what is given back may be half a pair


async def _events(running: Running, writer: Writer) -> AsyncIterator[bytes]:
    begun, events = False, list[Named]()
    try:
        async for deltas in running:
            if not begun:
                events += writer.begin(running.completions[0])
            begun = True
            events += [new for step in writer.blocks.push(deltas) for new in writer.step(step)]
            if events and not running.ended:  # the last go out in one
                yield _bytes(events)
                events = []
        completion = running.completions[0]
        if not begun:
            events += writer.begin(completion)
        events += [new for step in writer.blocks.end() for new in writer.step(step)]
        yield _bytes([*events, *writer.end(completion)])
    except Exception as error:
        yield _bytes(writer.failed(running.failed(error)))


def _bytes(events: Iterable[Named]) -> bytes:
    return b"".join(event(data, data["type"]) for data in events)
