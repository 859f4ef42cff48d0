"""A finished answer, split into reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .tool_calls.events import ArgumentsDelta, CallBegins, ContentDelta, Event, ReasoningDelta

if TYPE_CHECKING:
    from .answer_form import AnswerForm

__all__ = ["Answer", "ToolCall", "collect", "split_answer"]


@dataclass
class ToolCall:
    """A call of a tool. arguments: JSON text, as the model wrote it; it may be wrong or incomplete."""

    id: str
    name: str
    arguments: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The call as OpenAI's API and chat templates write it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Answer:
    """content: what is meant for the reader; reasoning: what the model thought before; tool_calls: what it asks for."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def to_message(self) -> dict[str, Any]:
        """The answer as the message that goes into the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


def split_answer(
    text: str, form: AnswerForm, tools: Sequence[Mapping[str, Any]] | None = None, *, reasoning: bool = False
) -> Answer:
    """What is what in the text of a whole answer, special tokens included. tools: as for ``Tokenizer.apply_chat``.

    reasoning: it begins inside the reasoning. Raises ParameterError for tools that are none.
    """
    from .splitter import Splitter  # the table of forms, which `import cuplama` need not wait for
    from .tool_calls.tools import read_tools

    splitter = Splitter(form, read_tools(tools), reasoning=reasoning)
    return collect([*splitter.push(text), *splitter.flush()])


def collect(events: Iterable[Event]) -> Answer:
    """The answer that all its events make."""
    content, thought, calls = [], [], []
    for event in events:
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            thought.append(event.text)
        elif isinstance(event, CallBegins):
            calls.append(ToolCall(event.id, event.name))
        elif isinstance(event, ArgumentsDelta):
            calls[event.index].arguments += event.text
    return Answer("".join(content), "".join(thought), calls)
