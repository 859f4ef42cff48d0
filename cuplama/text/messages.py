"""The messages of a chat: what a caller may give, and the form in which a template reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..arguments import shown
from ..errors import TokenizerError
from .template_reading import Reading

__all__ = ["checked_messages", "messages_for", "plain_data"]

_DEEPEST = 100  # lists and dicts inside one another
# What scalars become by their kind.
_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = ((str, str.__str__), (Integral, int), (Real, float))


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of `messages`: dicts with a role and a content, which is a string or a list of text parts.

    Other fields (`tool_calls`, `tool_call_id`, `reasoning_content`, ...) are kept as they are, but one that is None
    counts as absent: OpenAI's clients send such, and templates would print the word. An assistant's message that only
    calls tools needs no content. Raises TokenizerError naming the message and the field.
    """
    if not _is_list(messages):
        raise TokenizerError(f"messages must be a list of dicts, not {type(messages).__name__}")
    if not messages:
        raise TokenizerError("messages is empty: a chat needs at least one message")
    return [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TokenizerError(f"{where} must be a dict with role and content, not {shown(message)}")
    silent = message.get("content") is None and message.get("tool_calls")
    for field in ("role",) if silent else ("role", "content"):
        if field not in message:
            raise TokenizerError(f"{where} has no {field!r}")
    if not isinstance(message["role"], str):
        raise TokenizerError(f"{where}['role'] must be a string, not {shown(message['role'])}")
    content: Any = message.get("content")
    if _is_list(content):
        for i, part in enumerate(content):
            _check_part(part, f"{where}['content'][{i}]")
    elif not silent and not isinstance(content, str):
        raise TokenizerError(f"{where}['content'] must be a string or a list of text parts, not {shown(content)}")
    calls = message.get("tool_calls")
    if calls is not None and not (_is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise TokenizerError(f"{where}['tool_calls'] must be a list of dicts, not {shown(calls)}")
    return {field: value for field, value in plain_data(message, where).items() if value is not None}


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise TokenizerError(f'{where} must be {{"type": "text", "text": ...}}, not {shown(part)}')
    if kind != "text":
        raise TokenizerError(f"{where} is of type {shown(kind, 40)}; the model reads text, so only 'text' is allowed")
    if not isinstance(part.get("text"), str):
        raise TokenizerError(f"{where}['text'] must be a string, not {shown(part.get('text'))}")


def plain_data(value: Any, where: str) -> Any:
    """A deep copy of JSON-like data in Python's own types: dicts, lists, strings, numbers, booleans, None.

    where: what the value is called in an error. Nothing else is let into a template: what an object of another kind
    prints could be neither checked nor told from the template's own text. A string of a subclass becomes a string, so
    that a member of an enum prints its value, and a NumPy number cannot be asked to write a file. Raises
    TokenizerError.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _PLAIN:
        if isinstance(value, kind):
            return plain(value)
    if where.count("[") > _DEEPEST:  # or a list that holds itself
        raise TokenizerError(f"{where[:40]}... is nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TokenizerError(f"{where} has a key that is not a string: {shown(key)}")
        return {key: plain_data(item, f"{where}[{key!r}]") for key, item in value.items()}
    if _is_list(value):
        return [plain_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TokenizerError(f"{where} must be text, a number, a list or a dict, not {type(value).__name__}")


def messages_for(reading: Reading, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages in the form that a template reads.

    A template that loops over content parts gets them as they are, and a string as one part if it does not know
    strings; any other template gets one string, the parts joined by line breaks, as llama.cpp and vLLM join them.
    The arguments of tool calls that are JSON strings, as OpenAI's clients send them, become objects, unless the
    template prints them itself. Raises TokenizerError for arguments that are not JSON.
    """
    adapted = []
    for i, message in enumerate(messages):
        message, content = dict(message), message.get("content")
        if isinstance(content, list) and not reading.loops_over_content:
            message["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and reading.loops_over_content and not reading.tests_content_for_string:
            message["content"] = [{"type": "text", "text": content}]
        if message.get("tool_calls") and not reading.wants_arguments_as_text:
            where = f"messages[{i}]['tool_calls']"
            message["tool_calls"] = [_parsed(call, f"{where}[{j}]") for j, call in enumerate(message["tool_calls"])]
        adapted.append(message)
    return adapted


def _parsed(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call, or the function inside it, with its arguments as an object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parsed(call["function"], f"{where}['function']")}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "arguments": json.loads(arguments) if arguments.strip() else {}}
    except ValueError as error:
        raise TokenizerError(f"{where}['arguments'] is not JSON: {error}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
