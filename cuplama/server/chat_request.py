"""What a chat asks for: messages become the ids of a prompt, tools and reasoning what splits the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..chat import read_chat
from ..errors import ParameterError, TokenizerError
from ..model import Model
from ..text.answer_form import AnswerForm
from ..text.splitter import Splitter
from ..text.tool_calls.tools import Tool, read_tools
from .errors import ApiError
from .kinds import json_shown

__all__ = ["ChatRequest", "read_chat_request"]

_END = 32  # tokens at the end of a prompt among which a start tag of reasoning is looked for
_SWITCHES = ("enable_thinking", "thinking")  # variables of templates that turn reasoning on or off


@dataclass(frozen=True)
class ChatRequest:
    """A chat, ready for the model: the prompt's ids, and how its answer is split.

    form: how the model writes what is to be split off; tools: those that it may call; reasoning: whether the prompt
    ends inside the reasoning.
    """

    ids: list[int]
    form: AnswerForm
    tools: Mapping[str, Tool]
    reasoning: bool

    def splitter(self) -> Splitter:
        """Splits one answer."""
        return Splitter(self.form, self.tools, reasoning=self.reasoning)


def read_chat_request(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    effort: str | None = None,
) -> ChatRequest:
    """The chat that a request asks for. options: those of ``Model.chat`` that reach the template; effort: of reasoning.

    Raises ApiError 400 for messages that the template does not take, and for an effort that it does not read;
    ParameterError for tools that are none.
    """
    tokenizer = model.tokenizer
    known = read_tools(tools)
    full = tokenizer.answer_form
    form = full if known else replace(full, tools=None)
    given = {**_effort(model, effort), **_variables(model, options, bool(known))}
    chat = {**options, "template_args": given, **({"tools": list(tools)} if known and tools else {})}
    try:
        ids, _ = read_chat(tokenizer, _as_read(tokenizer.chat_template, messages), chat)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="messages" if str(error).startswith("messages") else None) from None
    end = tokenizer.decode(ids[-_END:], skip_special=False)
    return ChatRequest(ids, form, known, form.is_reasoning(end))


def _as_read(template: str | None, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages in the roles of the template: one that does not know developers, as most do not, has them as system."""
    if "developer" in (template or ""):
        return list(messages)
    return [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]


def _variables(model: Model, options: Mapping[str, Any], tools: bool) -> Mapping[str, Any]:
    """The variables that the client names, if the template reads them."""
    given: Mapping[str, Any] = options.get("template_args", {})
    try:
        model.tokenizer.check_variables(given, tools=tools, chat_template=options.get("chat_template"))
    except ParameterError as error:
        raise ApiError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None
    return given


def _effort(model: Model, effort: str | None) -> dict[str, Any]:
    """The variable of the template that says how much to reason."""
    reads = model.tokenizer.template_variables
    if effort is None:
        return {}
    if "reasoning_effort" in reads:
        return {"reasoning_effort": effort}
    if switches := [name for name in _SWITCHES if name in reads]:
        return {switches[0]: effort != "none"}
    if effort == "none" and model.tokenizer.answer_form.reasoning is None:
        return {}
    said = f"reasoning_effort = {json_shown(effort)} is not supported: the model's chat template reads nothing like it"
    raise ApiError(400, said, param="reasoning_effort")
