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
from ..text.tokenizer import Tokenizer
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
    tokenizer, known = model.tokenizer, read_tools(tools)
    form = tokenizer.answer_form if known else replace(tokenizer.answer_form, tools=None)
    variables = {**_effort(tokenizer, effort), **_variables(tokenizer, options, bool(known))}
    chat = {**options, "template_args": variables, "tools": list(tools) if known and tools else None}
    try:
        ids, _ = read_chat(tokenizer, _as_read(tokenizer.chat_template, messages), chat)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="messages" if str(error).startswith("messages") else None) from None
    return ChatRequest(ids, form, known, form.is_reasoning(tokenizer.decode(ids[-_END:], skip_special=False)))


def _as_read(template: str | None, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Messages with the roles and names that templates know.

    A template that does not know developers, as most do not, has them as system. Reasoning goes by DeepSeek's name,
    also where a client sends it back by vLLM's.
    """
    knows_developers = "developer" in (template or "")
    found = []
    for message in messages:
        message = dict(message)
        if message.get("role") == "developer" and not knows_developers:
            message["role"] = "system"
        if (reasoning := message.pop("reasoning", None)) is not None:
            message.setdefault("reasoning_content", reasoning)
        found.append(message)
    return found


def _variables(tokenizer: Tokenizer, options: Mapping[str, Any], tools: bool) -> Mapping[str, Any]:
    """The variables that the client names, if the template reads them."""
    given: Mapping[str, Any] = options.get("template_args", {})
    try:
        tokenizer.check_variables(given, tools=tools, chat_template=options.get("chat_template"))
    except ParameterError as error:
        raise ApiError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None
    return given


def _effort(tokenizer: Tokenizer, effort: str | None) -> dict[str, Any]:
    """The variable of the template that says how much to reason."""
    reads = tokenizer.template_variables
    if effort is None:
        return {}
    if "reasoning_effort" in reads:
        return {"reasoning_effort": effort}
    if switches := [name for name in _SWITCHES if name in reads]:
        return {switches[0]: effort != "none"}
    if effort == "none" and tokenizer.answer_form.reasoning is None:
        return {}
    said = f"reasoning_effort = {json_shown(effort)} is not supported: the model's chat template reads nothing like it"
    raise ApiError(400, said, param="reasoning_effort")
