"""How answers of a chat are written: content, reasoning and tool calls, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..completion import Completion, Delta
from ..engine.sequence import Token
from ..text.answer import collect
from ..text.splitter import ArgumentsDelta, CallBegins, CallEnds, ContentDelta, Event, ReasoningDelta, Splitter
from .answers import Choice
from .logprobs import Spelling, chat_logprobs, prompt_logprobs
from .split_text import SplitText

__all__ = ["ChatForm", "Shown"]


@dataclass(frozen=True)
class Shown:
    """What a client wants to see beside the text. logprobs: of each token; prompt_logprobs: how many of the best; ids:
    those of prompt and text; reasoning: the model's; several_calls: more than the first tool call."""

    logprobs: bool = False
    prompt_logprobs: int | None = None
    ids: bool = False
    reasoning: bool = True
    several_calls: bool = True


@dataclass
class _Text:
    """One answer as far as it has come. events: of a whole response; begun: whether a stream has said the role."""

    split: SplitText
    events: list[Event] = field(default_factory=list)
    begun: bool = False


class ChatForm:
    """Choices of a chat; see ``Form``. splitter: makes one for each answer; stop_ids: tokens that are not content."""

    id_prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, spelling: Spelling, splitter: Callable[[], Splitter], stop_ids: frozenset[int], shown: Shown
    ) -> None:
        self._spelling, self._splitter, self._stop_ids, self._shown = spelling, splitter, stop_ids, shown
        self._texts: dict[int, _Text] = {}

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning in all answers."""
        return sum(text.split.reasoning_tokens for text in self._texts.values())

    def head(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """What is of the prompt, of which there is one."""
        first, most = completions[0], self._shown.prompt_logprobs
        found: dict[str, Any] = {"prompt_token_ids": first.prompt_tokens} if self._shown.ids else {}
        if most is not None:
            found["prompt_logprobs"] = prompt_logprobs(self._spelling, first.prompt_logprobs, most)
        return found

    def watch(self, delta: Delta) -> None:
        """Split what has come."""
        text = self._text(delta.index)
        text.events += text.split.push([delta], last=delta.finish_reason is not None)

    def choice(self, completion: Completion) -> Choice:
        """The whole answer as a message."""
        text = self._text(completion.index)
        answer = collect(text.events)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message |= _reasoning(answer.reasoning)
        if answer.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in answer.tool_calls]
            message["content"] = answer.content or None
        found = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs or []),
            "finish_reason": _finish_reason(text, completion.finish_reason),
        }
        return found | ({"token_ids": completion.tokens} if self._shown.ids else {})

    def pieces(self, deltas: Sequence[Delta], end: str | None, so_far: Completion) -> list[Choice]:
        """The role first, then what has come, each kind by itself, and at last the reason of the end."""
        text = self._text(so_far.index)
        parts = _joined(text.split.push(deltas, last=end is not None))
        more: dict[str, Any] = {"logprobs": self._logprobs([delta.token for delta in deltas])}
        if self._shown.ids:
            more["token_ids"] = [delta.token.id for delta in deltas]
        if not parts and end is None and (self._shown.ids or self._shown.logprobs):
            parts = [{}]  # the text of these tokens is held back
        ends: list[str | None] = [None] * len(parts)
        if end is not None:
            parts, ends = [*parts, {}], [*ends, _finish_reason(text, end)]
        found = [_piece(so_far.index, part, why) for part, why in zip(parts, ends, strict=True)]
        if found:
            found[0] |= more
        if found and not text.begun:
            text.begun = True
            found.insert(0, _piece(so_far.index, {"role": "assistant", "content": ""}, None))
        return found

    def _text(self, index: int) -> _Text:
        if index not in self._texts:
            shown = self._shown
            split = SplitText(self._splitter(), reasoning=shown.reasoning, several_calls=shown.several_calls)
            self._texts[index] = _Text(split)
        return self._texts[index]

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Those of the content: a stop token is none."""
        if not self._shown.logprobs:
            return None
        return chat_logprobs(self._spelling, [token for token in tokens if token.id not in self._stop_ids])


def _piece(index: int, delta: dict[str, Any], end: str | None) -> Choice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": end}


def _finish_reason(text: _Text, end: str | None) -> str | None:
    return "tool_calls" if text.split.called and end == "stop" else end


def _reasoning(text: str) -> dict[str, str]:
    """By both names that clients know: DeepSeek's and vLLM's."""
    return {"reasoning_content": text, "reasoning": text}


def _joined(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Deltas of OpenAI's form; neighbours of one kind are one."""
    seen = (event for event in events if not isinstance(event, CallEnds))
    groups = groupby(seen, lambda event: (type(event), getattr(event, "index", 0)))
    return [_delta(list(group)) for _, group in groups]


def _delta(events: Sequence[Event]) -> dict[str, Any]:
    event = events[0]
    if isinstance(event, CallBegins):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
    text = "".join(e.text for e in events if isinstance(e, (ContentDelta, ReasoningDelta, ArgumentsDelta)))
    if isinstance(event, ArgumentsDelta):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": text}}]}
    return _reasoning(text) if isinstance(event, ReasoningDelta) else {"content": text}
