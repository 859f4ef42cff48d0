"""Messages as clients send them, in the form in which a template reads them. What is refused: test_chat_template.py."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest

from cuplama.errors import TokenizerError
from cuplama.text.chat_template import render
from cuplama.text.messages import checked_messages, plain_data

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
STRINGS = "{{ messages[0].content }}"
LISTS = "{% for part in messages[0].content %}[{{ part.type }}:{{ part.text }}]{% endfor %}"
BOTH = "{% if messages[0].content is string %}" + STRINGS + "{% else %}" + LISTS + "{% endif %}"


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (STRINGS, PARTS, "one\ntwo"),
        (STRINGS, [], ""),
        (STRINGS, "one", "one"),
        (LISTS, PARTS, "[text:one][text:two]"),
        (LISTS, "one", "[text:one]"),
        (BOTH, PARTS, "[text:one][text:two]"),
        (BOTH, "one", "one"),
    ],
)
def test_content_parts(template: str, content: Any, text: str) -> None:
    assert render(template, [{"role": "user", "content": content}]) == text


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video", "tool_result"])
def test_other_parts_are_refused_by_name(kind: str) -> None:
    parts: list[Any] = [*PARTS, {"type": kind, kind: {}}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]
    for template in (STRINGS, LISTS):
        with pytest.raises(TokenizerError, match=rf"messages\[1\]\['content'\]\[2\] is of type '{kind}'"):
            render(template, messages)


def call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    ]


def test_arguments_become_an_object_unless_the_template_prints_them_itself() -> None:
    as_json = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    as_text = "{{ 'x' + messages[0].tool_calls[0].function.arguments }}"
    for arguments in ('{"a":[1]}', {"a": [1]}):
        assert render(as_json, call(arguments)) == '{"a": [1]}'
    assert render(as_json, call("")) == "{}"
    assert render(as_text, call('{"a":[1]}')) == 'x{"a":[1]}'
    assert render("{{ messages[0].tool_calls[0].arguments | tojson }}", [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[1]"}]}
    ]) == "[1]"  # fmt: skip
    with pytest.raises(TokenizerError, match=r"messages\[0\]\['tool_calls'\]\[0\]\['function'\]\['arguments'\] is not"):
        render(as_json, call("{nonsense"))


def test_other_fields_are_kept() -> None:
    template = "{{ messages[0].reasoning_content }} {{ messages[1].tool_call_id }} {{ messages[1].role }}"
    messages = [
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "7", "content": "y"},
    ]
    assert render(template, messages) == "hm 7 tool"


def test_the_callers_messages_are_not_changed() -> None:
    messages = call('{"a": 1}')
    checked_messages(messages)[0]["tool_calls"][0]["function"]["name"] = "g"
    assert messages == call('{"a": 1}')
    render("{{ messages[0].tool_calls[0].function | tojson }}", messages)
    assert messages == call('{"a": 1}')


class Role(str, enum.Enum):  # noqa: UP042 - of which str() is not the value, unlike StrEnum's
    USER = "user"


class Level(enum.IntEnum):
    ONE = 1


def test_a_role_may_be_a_member_of_an_enum() -> None:
    assert (
        render("{{ messages[0].role }}: {{ messages[0].content }}", [{"role": Role.USER, "content": "x"}]) == "user: x"
    )


def test_a_field_that_is_none_is_absent() -> None:
    """As OpenAI's clients send it, where a template may ask whether a field is defined."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "refusal": None}
    assert render("{{ messages[0].content }}{{ 'refusal' in messages[0] }}", [message]) == "False"
    asked = {"role": "user", "content": "x", "tool_calls": None}
    assert render("{{ messages[0].tool_calls is defined }}", [asked]) == "False"


def test_plain_data() -> None:
    value = {"a": (1, 2.5, None, True, ["x"]), "b": {"c": np.int64(3)}}
    assert plain_data(value, "tools") == {"a": [1, 2.5, None, True, ["x"]], "b": {"c": 3}}
    with pytest.raises(TokenizerError, match=r"^tools\['a'\]\[1\] must be text, .*, not function$"):
        plain_data({"a": [1, test_plain_data]}, "tools")
    assert plain_data([Role.USER, np.str_("x"), Level.ONE, np.float32(0.5)], "tools") == ["user", "x", 1, 0.5]
    scalars = plain_data([Role.USER, np.str_("x"), Level.ONE, np.int8(1), np.float64(1)], "tools")
    assert [type(value) for value in scalars] == [str, str, int, int, float]
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TokenizerError, match=r"^tools\[0\]\[0\].*\.\.\. is nested more than 100 deep$"):
        plain_data(endless, "tools")
