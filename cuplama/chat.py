"""The keywords of ``Model.chat``: how to draw tokens, and what reaches the chat template, told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from .arguments import shown
from .errors import ParameterError
from .sampling_params import OPTIONS, SamplingOptions
from .text.tokenizer import Tokenizer

__all__ = ["ChatOptions", "read_chat"]


class ChatOptions(SamplingOptions, total=False):
    """Keywords of ``Model.chat`` and its kin: sampling parameters, and variables of the chat template.

    tools, documents, add_generation_prompt, continue_final_message, special_text, chat_template: as for
    ``Tokenizer.apply_chat``. The next ones are variables that many templates read. template_args: those that only
    some templates read, or that have the name of a sampling parameter; type checkers do not know their names. It holds
    variables alone: who only fills in a template cannot choose it, or turn special_text on.
    """

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    special_text: bool
    chat_template: str | None
    enable_thinking: bool | None
    thinking: bool
    reasoning_effort: str
    date_string: str
    template_args: Mapping[str, Any] | None


# Keywords that are not variables of a template.
_OWN = frozenset({"special_text", "chat_template", "template_args"})


def read_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> tuple[list[int], SamplingOptions]:
    """The prompt's ids and the sampling parameters of a chat. options: those of ChatOptions.

    Raises ParameterError for a name that is neither a sampling parameter nor a variable of the template, and what
    ``Tokenizer.apply_chat`` raises.
    """
    options = dict(options)
    more = {} if (found := options.pop("template_args", None)) is None else found
    if not isinstance(more, Mapping) or not all(isinstance(name, str) for name in more):
        raise ParameterError(f"template_args = {shown(more)}: it must be a mapping of variables' names to values")
    sampling = {name: value for name, value in options.items() if name in OPTIONS}
    chat = {**more, **{name: value for name, value in options.items() if name not in OPTIONS}}
    if own := sorted(_OWN & more.keys()):
        raise ParameterError(f"template_args: {own[0]} is not a variable of a template; give it as a keyword")
    tokenizer.check_variables(
        chat, tools=bool(chat.get("tools")), chat_template=chat.get("chat_template"), others={*OPTIONS, *_OWN}
    )
    return tokenizer.apply_chat(messages, **chat), cast("SamplingOptions", sampling)
