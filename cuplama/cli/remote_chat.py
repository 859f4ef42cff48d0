"""A chat with a model on a server of OpenAI's kind, with the same face as one with a model of this machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..completion import Timings
from ..errors import ParameterError
from ..lab.report import counted
from .conversation import Conversation
from .openai_server import OpenAIServer, ServerError
from .running import speed
from .streams import notice, say, write_text

__all__ = ["Answer", "RemoteSession", "find_name"]

_MOST_NAMED = 10  # models that a message names
_TOO_LONG = "context_length_exceeded"  # the code of a prompt that is too long


def find_name(server: OpenAIServer) -> str:
    """The name of the server's model. Raises ParameterError where there is none, or more than one to choose from."""
    names = server.models()
    if len(names) == 1:
        return names[0]
    if not names:
        raise ParameterError(f"{server.base} has no model")
    more = ", ..." if len(names) > _MOST_NAMED else ""
    raise ParameterError(
        f"{server.base} has {len(names)} models; name one with -m: {', '.join(names[:_MOST_NAMED])}{more}"
    )


@dataclass
class Answer:
    """What the server gave, until now or as a whole.

    reasoning: what servers send apart from the text; calls: of tools, as JSON objects with name and arguments; usage:
    the server's count of tokens, where it was asked for; first, last: when the first and the last piece came.
    """

    model: str
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return not (self.text or self.reasoning or self.calls)

    def add(self, delta: Mapping[str, Any], shown: _Shown) -> None:
        """Add what a chunk brings, and show it."""
        reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
        text, calls = delta.get("content") or "", delta.get("tool_calls") or ()
        if reasoning or text or calls:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self.reasoning += reasoning
        self.text += text
        _gather(self.calls, calls)
        shown.reasoning(reasoning)
        shown.text(text)

    def timings(self) -> Timings:
        """Where the time went, as this side sees it: the way to the server and its queue belong to the prompt's."""
        count = int(self.usage.get("completion_tokens") or 0)
        first, rest = self.first - self.began, self.last - self.first
        return Timings(int(self.usage.get("prompt_tokens") or 0), first, max(0, count - 1), rest, count)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        found = {"text": self.text, "reasoning": self.reasoning, "tool_calls": self.calls}
        return {**found, "finish_reason": self.finish_reason, "model": self.model, "usage": self.usage}


@dataclass
class RemoteSession:
    """A model on a server, what it is asked with, and what was said.

    sampling: parameters of the answers that were given, as ``Model.stream`` takes them; template: tools, documents and
    variables of the chat template; stats: print tokens and speed after each answer; usage: ask for the count of tokens,
    which not every server can be asked for.
    """

    server: OpenAIServer
    name: str
    sampling: Mapping[str, Any]
    template: Mapping[str, Any]
    conversation: Conversation
    stats: bool = False
    usage: bool = False

    @property
    def where(self) -> str:
        """What the banner says behind the model's name."""
        return f"at {self.server.base}"

    def ask(self, question: str, show: bool = True) -> Answer:
        """Answer a question, on stdout as it comes if it is to be shown, and keep both, without the reasoning.

        If Ctrl-C stops it, what was said so far is kept and finish_reason is None. Raises KeyboardInterrupt if nothing
        was said, and ServerError where the server does not answer to the end: neither is kept.
        """
        answer, shown = Answer(self.name, began=time.perf_counter()), _Shown(show)
        try:
            self._read(question, answer, shown)
        except KeyboardInterrupt:
            if answer.empty:
                raise
            answer.finish_reason = None
        except ServerError:
            shown.break_off()
            raise
        answer.calls = [{"name": c["name"], "arguments": _parsed(c["arguments"])} for c in answer.calls]
        calls = [json.dumps(call, ensure_ascii=False) for call in answer.calls]
        for call in calls:
            shown.line(call)
        shown.end()
        self.conversation.add(question, answer.text or "\n".join(calls))
        self._say_of(answer)
        return answer

    def _read(self, question: str, answer: Answer, shown: _Shown) -> None:
        with closing(self._chunks(question)) as chunks:
            for chunk in chunks:
                answer.usage = chunk.get("usage") or answer.usage
                for choice in (chunk.get("choices") or ())[:1]:
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    answer.add(choice.get("delta") or {}, shown)

    def _chunks(self, question: str) -> Generator[dict[str, Any]]:
        """The chunks of the answer; the oldest turns are left out until the server has room for the others."""
        skip = 0
        while True:
            body = {**self._body(), "messages": self.conversation.messages(question, skip)}
            chunks = self.server.chat(body)
            try:
                first = next(chunks, None)
            except ServerError as e:
                if e.code != _TOO_LONG or skip >= len(self.conversation.turns):
                    raise
                skip += 1
                continue
            if skip:
                messages = self.conversation.forget(skip)
                notice(f"left out the {messages} oldest messages: the conversation no longer fits the server's context")
            if first is not None:
                yield first
                yield from chunks
            return

    def _body(self) -> dict[str, Any]:
        """The request without its messages."""
        body: dict[str, Any] = {"model": self.name, **{k: v for k, v in self.sampling.items() if v is not None}}
        if "logit_bias" in body:  # JSON has no infinity; OpenAI's -100 bans a token
            body["logit_bias"] = {str(t): v if math.isfinite(v) else -100 for t, v in body["logit_bias"].items()}
        if "stop" in body:
            body["stop"] = list(body["stop"])
        if "json_schema" in body:  # as every server of this interface knows it
            form = {"name": "answer", "schema": body.pop("json_schema")}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        variables = {k: v for k, v in self.template.items() if k not in ("tools", "documents")}
        body |= {k: v for k, v in self.template.items() if k not in variables}
        if variables:
            body["chat_template_kwargs"] = variables
        if self.usage or self.stats:
            body["stream_options"] = {"include_usage": True}
        return body

    def _say_of(self, answer: Answer) -> None:
        limit = self.sampling.get("max_tokens")
        if answer.finish_reason == "length" and limit != 0:
            why = "the server's limit is reached" if limit is None else f"-n {limit}"
            at = "" if limit is None else f" at {counted(limit, 'token')}"
            notice(f"the answer was cut{at} ({why})")
        if self.stats:
            say(speed(answer.timings()))


class _Shown:
    """What is written on stdout of an answer: reasoning between the tags that a model of this machine writes itself."""

    def __init__(self, show: bool) -> None:
        self._show, self._thinking, self._last = show, False, ""

    def reasoning(self, text: str) -> None:
        if text and not self._thinking:
            self._thinking = True
            text = f"<think>\n{text}"
        self._write(text)

    def text(self, text: str) -> None:
        if text:
            self._end_thinking()
        self._write(text)

    def line(self, text: str) -> None:
        """A line of its own."""
        self.text(f"{text}\n" if self._last in ("", "\n") else f"\n{text}\n")

    def break_off(self) -> None:
        """End the line, if there is one."""
        if self._last not in ("", "\n"):
            self._write("\n")

    def end(self) -> None:
        """End the answer: at least an empty line."""
        self._end_thinking()
        if self._last != "\n":
            self._write("\n")

    def _end_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write("</think>\n\n" if self._last == "\n" else "\n</think>\n\n")

    def _write(self, text: str) -> None:
        if text and self._show:
            write_text(text)
            self._last = text[-1]


def _gather(calls: list[dict[str, Any]], deltas: Iterable[Mapping[str, Any]]) -> None:
    """Add to the calls what a chunk brings of them: a name once, and arguments piece by piece."""
    for delta in deltas:
        at = delta.get("index")
        at = len(calls) if not isinstance(at, int) else at
        while len(calls) <= at:
            calls.append({"name": "", "arguments": ""})
        function = delta.get("function") or {}
        calls[at]["name"] += function.get("name") or ""
        calls[at]["arguments"] += function.get("arguments") or ""


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
