"""From a chat to the text of its prompt: which template, which variables reach it, and where the prompt ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import checked, flag, shown, type_of
from ..errors import ParameterError, TokenizerError
from .chat_template import ChatTemplate, chat_template
from .control_tokens import private_characters
from .messages import checked_messages, messages_for, plain_data

__all__ = [
    "MODELS_WITH_TEMPLATE",
    "STANDARD_VARIABLES",
    "ChatTemplates",
    "chat_messages",
    "chat_values",
    "check_names",
    "harmless_chats",
    "prompt_text",
]

# Variables that every chat accepts, whether or not its template reads them: clients send them to any model.
STANDARD_VARIABLES = frozenset(
    {"tools", "documents", "enable_thinking", "add_generation_prompt", "continue_final_message"}
)
# Small models that run here and bring a template, for the one who has a model without.
MODELS_WITH_TEMPLATE = ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
# Follows the marker of `continue_final_message`: blank to whatever strips a message, and printed by no template.
_BLANK = "\x1f"
_CHAT: list[dict[str, Any]] = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
# A chat in which a tool is called and answers. Mistral's templates want ids of nine letters.
_CALL = {"id": "x" * 9, "type": "function", "function": {"name": "x", "arguments": "{}"}}
_TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "x", "tool_calls": [_CALL]},
    {"role": "tool", "content": "x", "tool_call_id": "x" * 9},
]


@dataclass(frozen=True)
class ChatTemplates:
    """The templates of a model folder by name: name -> jinja2 source."""

    sources: Mapping[str, str]

    @property
    def default(self) -> str | None:
        """The source of the template that a chat has unless it says otherwise."""
        return self.sources.get("default")

    def choose(self, name: str | None = None, *, tools: bool = False) -> ChatTemplate:
        """The template called `name`; without a name `tool_use` where there are tools and it exists, or the default.

        Raises ParameterError for what is no name, and TokenizerError if there is no such template, or if it does not
        compile.
        """
        if name is not None and not isinstance(name, str):
            raise ParameterError(
                f"chat_template = {shown(name)} is {type_of(name)}; it must be a template's name, or None"
            )
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TokenizerError(self._missing(name))
        return chat_template(self.sources[name])

    def _missing(self, name: str) -> str:
        if self.sources:
            return f"the model has no chat template named {name!r} (only {', '.join(self.sources)})"
        return (
            "the model has no chat template: use generate (of a server: /v1/completions) with a plain prompt, put a "
            "chat_template.jinja into the model folder, or take a model that has one, such as "
            f"{' or '.join(MODELS_WITH_TEMPLATE)}"
        )


def check_names(given: Collection[str], template: ChatTemplate, others: Collection[str] = ()) -> None:
    """Raises ParameterError for a name that is no variable of the template, with the nearest one that is.

    others: names of another kind that the caller takes as well, the sampling parameters.
    """
    reads = template.reading.variables
    known = {*reads, *STANDARD_VARIABLES, *others}
    for name in sorted(set(given) - known):
        kind = "neither a sampling parameter nor" if others else "not"
        import difflib  # 4 ms, for an error alone

        near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.65)  # bos_token is not min_tokens
        hint = f"; did you mean {near[0]}?" if near else ""
        listed = ", ".join(sorted(reads)) or "none"
        raise ParameterError(f"{name} is {kind} a variable of the chat template{hint} (the template reads: {listed})")


def chat_values(template: ChatTemplate, given: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a chat as plain data, checked; empty tools and documents count as none.

    given: name -> value, `continue_final_message` and `add_generation_prompt` (None: what fits) among them.
    Raises ParameterError and TokenizerError.
    """
    check_names(given, template)
    values = {name: plain_data(value, name) for name, value in given.items()}
    continued = checked("continue_final_message", values.get("continue_final_message", False), flag, "True or False")
    begins = values.get("add_generation_prompt")
    begins = not continued if begins is None else checked("add_generation_prompt", begins, flag, "True or False")
    if begins and continued:
        raise ParameterError(
            "continue_final_message ends the prompt inside the last message; it excludes add_generation_prompt=True"
        )
    for name in ("tools", "documents"):
        items = values.get(name)
        if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
            raise TokenizerError(f"{name} must be a list of dicts, not {shown(items)}")
        values[name] = items or None
    return {**values, "continue_final_message": continued or None, "add_generation_prompt": begins}


def chat_messages(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, checked, in the form that the template reads. Raises TokenizerError."""
    return messages_for(template.reading, checked_messages(messages))


def harmless_chats(template: ChatTemplate, special_tokens: Mapping[str, str]) -> list[str]:
    """What the template prints for each of two chats of one letter a message: marks of turns, and those of tools.

    "" for a chat that it refuses.
    """
    return [_harmless(template, messages, special_tokens) for messages in (_CHAT, _TOOL_CHAT)]


def _harmless(template: ChatTemplate, messages: Sequence[dict[str, Any]], special_tokens: Mapping[str, str]) -> str:
    try:
        return template.text(messages_for(template.reading, messages), special_tokens)
    except TokenizerError:
        return ""


def prompt_text(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    """The prompt of messages and values that are in the template's form.

    With `continue_final_message` it ends where the content of the last message ends. Blanks at that end are left out
    if the template strips messages, so that the prompt is the beginning of what the template prints for a longer
    message. Raises TokenizerError if the template fails, or prints something else than the content there.
    """
    if not values["continue_final_message"]:
        return template.text(messages, values)
    [marker] = private_characters(1, template.source + repr([messages, values]))
    content = _last_text(messages)
    text = template.text([*messages[:-1], _with_last_text(messages[-1], content + marker + _BLANK)], values)
    end = text.rfind(marker)
    kept = text[: max(end, 0)]
    if content.strip() and not text.startswith(_BLANK, end + 1):
        kept = kept[: len(kept) - (len(content) - len(content.rstrip()))]
    if end < 0 or not kept.rstrip().endswith(content.strip()):
        raise TokenizerError(
            "continue_final_message: the chat template rewrites the last message or leaves it out, "
            "so there is no place in it to go on from"
        )
    return kept


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text at the end of the last message: its content, or the last part of it."""
    content = messages[-1].get("content")
    text = content[-1]["text"] if isinstance(content, list) and content else content
    if not isinstance(text, str):
        raise TokenizerError("continue_final_message: the last message has no text to go on from")
    return text


def _with_last_text(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [*content[:-1], {**content[-1], "text": text}]}
    return {**message, "content": text}
