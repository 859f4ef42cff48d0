"""How a model writes an answer: its reasoning and its tool calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..arguments import one_of
from .reasoning import REASONING_FORMATS, ReasoningFormat
from .tool_calls.formats import DEFAULT_FORMAT, TOOL_FORMATS, ToolFormat

__all__ = ["AnswerForm", "find_form"]

_Form = TypeVar("_Form", ReasoningFormat, ToolFormat)


@dataclass(frozen=True)
class AnswerForm:
    """The forms of reasoning and of tool calls; None: there is none that would be split off."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Tags and other texts that must be seen, also where they are special tokens, to split an answer."""
        found = (self.reasoning.texts if self.reasoning else ()) + (self.tools.texts if self.tools else ())
        return tuple(text for text in found if text)

    def is_reasoning(self, prompt: str) -> bool:
        """Whether a prompt ends inside the reasoning. prompt: its text with special tokens, or the end of that."""
        return self.reasoning is not None and self.reasoning.is_open(prompt)


def find_form(
    template: str | None, tokens: Collection[str], *, reasoning: str | None = None, tools: str | None = None
) -> AnswerForm:
    """The form that a chat template and the added tokens tell: first the template's text, then the tokens.

    reasoning, tools: names of formats that are taken instead, "none" for none. Raises ParameterError for another name.
    A model that tells no form of calls gets Llama's, JSON without tags.
    """
    source = template or ""
    return AnswerForm(
        _find("reasoning_format", REASONING_FORMATS, reasoning, source, tokens),
        _find("tool_format", TOOL_FORMATS, tools, source, tokens) or (None if tools == "none" else DEFAULT_FORMAT),
    )


def _find(
    option: str, forms: Mapping[str, _Form], chosen: str | None, template: str, tokens: Collection[str]
) -> _Form | None:
    if chosen is not None:
        one_of(option, chosen, ("none", *forms))
        return forms.get(chosen)
    in_template = (form for form in forms.values() if any(marker in template for marker in form.markers))
    in_tokens = (form for form in forms.values() if any(marker in tokens for marker in form.markers))
    return next(in_template, None) or next(in_tokens, None)
