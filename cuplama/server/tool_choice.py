"""Which tools an answer may or must call, and the grammar that keeps it to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model import Model
from ..text.tool_calls.tools import Tool
from ..text.tool_grammar import tool_grammar
from .chat_request import ChatRequest
from .errors import ApiError
from .kinds import json_shown

__all__ = ["AUTO", "NONE", "ToolChoice", "read_choice", "tool_constraint"]


@dataclass(frozen=True)
class ToolChoice:
    """tools: whether there are any; required: there must be a call; name: of the only tool that may be called."""

    tools: bool = True
    required: bool = False
    name: str | None = None


NONE, AUTO = ToolChoice(tools=False), ToolChoice()
_WORDS: Mapping[str, ToolChoice] = {"none": NONE, "auto": AUTO, "required": ToolChoice(required=True)}


def read_choice(value: Any) -> ToolChoice:
    """What ``tool_choice`` of OpenAI's two APIs says. Raises ApiError 400 for what it cannot say.

    It is none, auto, required, or an object with type "function" and the name of one, inside ``function`` or beside it.
    """
    if value is None:
        return AUTO
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, Mapping) and value.get("type", "function") == "function":
        name = value.get("function", value)
        name = name.get("name") if isinstance(name, Mapping) else None
        if isinstance(name, str):
            return ToolChoice(required=True, name=name)
    said = f"tool_choice = {json_shown(value)} is not supported; supported: none, auto, required, or one function"
    raise ApiError(400, said, param="tool_choice")


def tool_constraint(model: Model, chat: ChatRequest, choice: ToolChoice, parallel: bool = True) -> dict[str, str]:
    """The sampling parameter that holds the answer to a choice; {} where nothing is to be held.

    A tool that is strict is held to its schema also where no call must come. parallel: several calls may come.
    Raises ApiError 400 for a tool that is not there.
    """
    tools = _chosen(chat.tools, choice)
    if not choice.required and not any(tool.strict for tool in tools):
        return {}
    grammar = tool_grammar(
        chat.form,
        tools,
        model.tokenizer.special_texts,
        reasoning=chat.reasoning,
        parallel=parallel and choice.name is None,
        required=choice.required,
    )
    return {} if grammar is None else {"grammar": grammar}


def _chosen(tools: Mapping[str, Tool], choice: ToolChoice) -> list[Tool]:
    if choice.name is not None and choice.name not in tools:
        said = f"tool_choice names {json_shown(choice.name)}, which is none of the tools: {', '.join(tools) or 'none'}"
        raise ApiError(400, said, param="tool_choice")
    if choice.required and not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
    return list(tools.values()) if choice.name is None else [tools[choice.name]]
