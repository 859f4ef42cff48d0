"""Grammars that make a model call tools: in its own form, and with arguments that follow the tools' schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .answer_form import AnswerForm
from .reasoning import ReasoningFormat
from .tool_calls.bodies_grammar import BODIES
from .tool_calls.formats import ToolFormat
from .tool_calls.lark import Lark
from .tool_calls.tools import Tool

__all__ = ["tool_grammar"]

# Kinds of body that have all calls between one pair of tags -> what opens them, stands between them, and closes them.
_TOGETHER: Mapping[str, tuple[str, str, str]] = {
    "json list": ('"["', '", "', '"]"'),
    "python": ('"["', '", "', '"]"'),
    "python lines": ("", '"\\n"', "BLANK?"),
}
_BARE = '"; "'  # between calls that have no tags


def tool_grammar(
    form: AnswerForm,
    tools: Sequence[Tool],
    special: Mapping[str, int],
    *,
    reasoning: bool = False,
    parallel: bool = True,
    required: bool = True,
) -> str | None:
    """A grammar, as of the parameter ``grammar``, of answers that call one of the tools, after any reasoning.

    special: text of each special token -> its id, as of ``Tokenizer.special_texts``; reasoning: the prompt ends inside
    the reasoning; parallel: several calls may come. required: there is no content; otherwise any content may come, and
    what begins like a call is one. None: the form of the model's answers is not such that this can be said (harmony's
    channels).
    """
    lark, calls = Lark(special), form.tools
    if calls is None or not tools or (calls.ends_turn and not required):
        return None
    call = lark.one_of([BODIES[calls.body](lark, tool, calls.written) for tool in tools])
    thought = _reasoning(lark, form.reasoning, reasoning)
    body = _required(lark, calls, call, parallel) if required else _free(lark, calls, call, parallel)
    return lark.grammar(f"{thought} {body}")


def _reasoning(lark: Lark, form: ReasoningFormat | None, begun: bool) -> str:
    if form is None:
        return "BLANK?"
    rest = f"{lark.up_to(form.end)} BLANK? {lark.text(form.after)}"
    return rest if begun else f"BLANK? ({lark.text(form.start)} {rest})?"


def _required(lark: Lark, form: ToolFormat, call: str, several: bool) -> str:
    if form.bare and not form.bare_anywhere:
        return _untagged(lark, form, call, several)
    start = lark.text(form.starts[0])
    if form.body in _TOGETHER:
        return f"{start} {_tagged(lark, form, call, several)}"
    item = lark.rule(f"{start} {_tagged(lark, form, call, several)}")
    return lark.between(item, "BLANK?", several and not form.ends_turn)


def _tagged(lark: Lark, form: ToolFormat, call: str, several: bool) -> str:
    """What follows a start tag, with the end tag."""
    end = "" if form.ends_turn else lark.text(form.end)
    if form.body in _TOGETHER:
        opening, separator, closing = _TOGETHER[form.body]
        end = f"({end})?" if end and form.body == "json list" else end  # most models leave it out there
        return f"BLANK? {opening} {lark.between(call, separator, several)} {closing} {end}"
    blank = "BLANK?" if end else ""
    return f"{blank} {call} {blank} {end}"


def _untagged(lark: Lark, form: ToolFormat, call: str, several: bool) -> str:
    opening, separator, closing = _TOGETHER.get(form.body, ("", _BARE, ""))
    return f"{opening} {lark.between(call, separator, several)} {closing}"


def _free(lark: Lark, form: ToolFormat, call: str, several: bool) -> str:
    """Content, with calls in it."""
    if form.bare and not form.bare_anywhere:
        other = rf"/[^\s\{form.bare}](?s:.*)/"
        return lark.rule(f"{_untagged(lark, form, call, several)} | {other} |")
    item = lark.rule(f"{lark.up_to(form.starts[0])} {_tagged(lark, form, call, several)}")
    return f"{item}{'*' if several else '?'} TEXT"
