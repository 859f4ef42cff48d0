"""From the tokens of a request to its response, whole or as a stream: what OpenAI's two endpoints have in common."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..completion import Completion, Delta
from ..model import Model
from .errors import error_body
from .fields import Read
from .generating import Asked, Running, usage
from .service import Service
from .sse import DONE, EventStream, TextEvents, event, events_with, text_events

__all__ = ["RESPONSE_SCHEMA", "Choice", "Form", "answer"]

Choice = dict[str, Any]
_COUNT = {"type": "integer", "minimum": 0}
# What every whole response has. Fields beside these depend on what was asked for.
RESPONSE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["chat.completion", "text_completion"]},
        "created": _COUNT,
        "model": {"type": "string"},
        "system_fingerprint": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "logprobs", "finish_reason"],
                "properties": {"index": _COUNT, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}},
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
            "additionalProperties": {"anyOf": [_COUNT, {"type": "object", "additionalProperties": _COUNT}]},
        },
    },
}


class Form(Protocol):
    """How an endpoint writes what was generated. It belongs to one request, and knows how far each text is.

    id_prefix: of the response's id; whole, chunk: values of ``object``; reasoning_tokens: how many of those seen so far
    were reasoning.
    """

    id_prefix: str
    whole: str
    chunk: str

    @property
    def reasoning_tokens(self) -> int: ...

    def watch(self, delta: Delta) -> None:
        """Take note of what comes for a whole response, of which ``choice`` is asked at the end."""
        ...

    def choice(self, completion: Completion) -> Choice:
        """An element of ``choices`` of a whole response."""
        ...

    def pieces(self, deltas: Sequence[Delta], end: str | None, so_far: Completion) -> list[Choice | str]:
        """Elements of ``choices`` of a stream's events, each for an event of its own. A string stands for the element
        that ``more`` makes of it: most events of a stream are such, and are written at once.

        deltas: of one text, what is new; end: the finish_reason, where this is the last of the text; so_far: its
        completion when it began, which has the prompt.
        """
        ...

    def more(self, index: int, text: str) -> Choice:
        """An element that says no more than how the text of that index goes on."""
        ...

    def head(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Fields beside ``choices``, of a whole response or a stream's first event."""
        ...


async def answer(service: Service, request: Request, read: Read, asked: Asked, form: Form) -> Response:
    """Generate, and answer in the endpoint's form. Raises what the generation raises before anything is sent."""
    if read.unknown:
        request.state.meter.fields["ignored_fields"] = read.unknown[:16]
    running = Running(service, request, asked)
    head = {
        "id": form.id_prefix + request.state.id,
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": _fingerprint(asked.model),
    }
    if read.own["stream"]:
        events = _events(running, form, {**head, "object": form.chunk}, read.own["stream_options"] or {})
        return EventStream(events, running.close)
    try:
        async for deltas in running.seldom():
            for delta in deltas:
                form.watch(delta)
        completions = running.completions
    finally:
        await running.close()
    choices = [form.choice(completion) for completion in completions]
    counted = usage(completions, asked.n, form.reasoning_tokens)
    return JSONResponse(
        {**head, "object": form.whole, "choices": choices, "usage": counted, **form.head(completions)},
    )


def _fingerprint(model: Model) -> str:
    """Changes with whatever may change the text of a seed: the model, where and in what it computes, the version."""
    said = (__version__, model.name, model.adapter, model.backend.name, model.backend.dtype.name)
    return "fp_" + hashlib.sha256(repr(said).encode()).hexdigest()[:10]


async def _events(
    running: Running, form: Form, head: Mapping[str, Any], options: Mapping[str, bool]
) -> AsyncIterator[bytes]:
    """The events of a stream. An error in its middle is its last object."""
    stream, events = _Stream(running, form, head, options), b""
    try:
        async for deltas in running:
            events += stream.events(deltas)
            if events and not running.ended:  # the last go out in one: many texts may end at once, 0.1 ms a sending
                yield events
                events = b""
        yield events + stream.end() + DONE
    except Exception as error:
        yield event(error_body(running.failed(error))) + DONE


class _Stream:
    """Writes a stream's events. head: the fields that all of them have."""

    def __init__(self, running: Running, form: Form, head: Mapping[str, Any], options: Mapping[str, bool]) -> None:
        self._running, self._form, self._write = running, form, events_with(head)
        self._include = options.get("include_usage", False)
        self._always = self._include and options.get("continuous_usage_stats", False)
        self._first, self._generated = True, 0
        self._open = set(range(len(running.asked.prompts) * running.asked.n))
        self._begun: dict[int, Completion] = {}
        self._more: dict[int, TextEvents] = {}

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The events for deltas that came together; what belongs to one text is joined."""
        new: dict[int, list[Delta]] = {}
        for delta in deltas:
            new.setdefault(delta.index, []).append(delta)
        self._begin(new)
        self._generated += len(deltas)
        return b"".join([self._pieces(i, together, together[-1].finish_reason) for i, together in new.items()])

    def end(self) -> bytes:
        """The events for texts that ended without a token, and for the count of tokens."""
        completions = self._running.completions
        self._begin(self._open)
        found = [self._pieces(i, [], completions[i].finish_reason) for i in sorted(self._open)]
        if self._include:
            counted = usage(completions, self._running.asked.n, self._form.reasoning_tokens)
            found.append(self._write({"choices": [], "usage": counted}))
        return b"".join(found)

    def _begin(self, indices: Collection[int]) -> None:
        """Keep the completions of texts that begin: what is of their prompts is whole by now."""
        if begin := [index for index in indices if index not in self._begun]:
            completions = self._running.completions
            self._begun |= {index: completions[index] for index in begin}

    def _pieces(self, index: int, deltas: list[Delta], end: str | None) -> bytes:
        if end is not None:
            self._open.discard(index)
        pieces = self._form.pieces(deltas, end, self._begun[index])
        return b"".join([self._event(index, piece) for piece in pieces])

    def _event(self, index: int, piece: Choice | str) -> bytes:
        if not isinstance(piece, str):
            return self._write(self._object(piece))
        if self._always:  # the count is another one each time
            return self._write(self._object(self._form.more(index, piece)))
        if index not in self._more:
            self._more[index] = text_events(self._write, lambda text: self._object(self._form.more(index, text)))
        return self._more[index](piece)

    def _object(self, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"choices": [choice]}
        if self._first:
            self._first = False
            found |= self._form.head(list(self._begun.values()))
        if self._include:
            found["usage"] = self._count() if self._always else None
        return found

    def _count(self) -> dict[str, int]:
        read = sum(map(len, self._running.asked.prompts))
        return {"prompt_tokens": read, "completion_tokens": self._generated, "total_tokens": read + self._generated}
