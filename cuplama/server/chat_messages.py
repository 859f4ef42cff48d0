"""Messages of a chat, put together from the items and blocks of which newer APIs make a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError
from .kinds import json_shown

__all__ = ["Conversation", "text_of", "wanted"]


def wanted(value: Any, kind: type, where: str, words: str, param: str) -> Any:
    """The value, if it is of that type. Raises ApiError 400."""
    if not isinstance(value, kind):
        raise ApiError(400, f"{where} = {json_shown(value)}; it must be {words}", param=param)
    return value


def text_of(content: Any, where: str, param: str, types: Sequence[str]) -> str:
    """Text that is given as a string, or as parts of one of ``types``, which have it under ``text``.

    Raises ApiError 400 for other parts: the model reads text alone.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(wanted(content, list, where, "a string or a list of parts", param)):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in types:
            said = f"{where}[{i}] is of type {json_shown(kind, 40)}; the model reads text, so it must be {types[0]}"
            raise ApiError(400, said, param=param)
        texts.append(wanted(part.get("text"), str, f"{where}[{i}].text", "a string", param))
    return "\n".join(texts)


class Conversation:
    """Collects messages. What an assistant says in a row, reasoning, text and calls, is one message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # id of a call -> name of its tool

    def say(self, role: str, text: str) -> None:
        """A message, or more of the assistant's."""
        if role == "assistant":
            message = self._assistant()
            message["content"] = "\n".join(filter(None, [message["content"], text]))
        else:
            self.messages.append({"role": role, "content": text})

    def think(self, text: str) -> None:
        """Reasoning of the assistant. What comes after an answer belongs to the next one."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and (last["content"] or "tool_calls" in last):
            self.messages.append({"role": "assistant", "content": ""})
        message = self._assistant()
        message["reasoning_content"] = "\n".join(filter(None, [message.get("reasoning_content"), text]))

    def call(self, id: str, name: str, arguments: str) -> None:
        """A call of a tool by the assistant."""
        self._names[id] = name
        function = {"name": name, "arguments": arguments}
        self._assistant().setdefault("tool_calls", []).append({"id": id, "type": "function", "function": function})

    def result(self, id: str, text: str) -> None:
        """What a tool gave. Some templates want its name."""
        message = {"role": "tool", "tool_call_id": id, "content": text}
        self.messages.append(message | ({"name": self._names[id]} if id in self._names else {}))

    def instruct(self, text: str) -> None:
        """Instructions, which come first. Templates know one message of the system alone."""
        if self.messages and self.messages[0]["role"] in ("system", "developer"):
            text = f"{text}\n\n{self.messages.pop(0)['content']}"
        self.messages.insert(0, {"role": "system", "content": text})

    def _assistant(self) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]
