"""Which template a chat has, which variables reach it, and where the prompt ends."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import ParameterError, TokenizerError
from cuplama.text.chat_prompt import MODELS_WITH_TEMPLATE
from cuplama.text.tokenizer import Tokenizer
from tests.text.test_control_tokens import CHATML, byte_level
from tests.text.test_tokenizer import write

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def text(template: str | dict[str, str], messages: Any = HI, **options: Any) -> str:
    """The prompt as text, control tokens included."""
    named = {"default": template} if isinstance(template, str) else template
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|end|>"}, named)
    return tokenizer.decode(tokenizer.apply_chat(messages, **options), skip_special=False)


# --- Variables ------------------------------------------------------------------------------------

READS = "{{ tools }}|{{ documents }}|{{ enable_thinking }}|{{ style }}|{{ add_generation_prompt }}"


def test_variables_reach_the_template() -> None:
    assert text(READS) == "None|None|||True"
    options: dict[str, Any] = {"enable_thinking": False, "style": "x", "add_generation_prompt": False}
    assert text(READS, tools=[{"a": 1}], documents=[{"b": 2}], **options) == "[{'a': 1}]|[{'b': 2}]|False|x|False"
    assert text("{{ continue_final_message is defined }}") == "False"


def test_standard_variables_are_accepted_where_the_template_does_not_read_them() -> None:
    assert text("Hi", enable_thinking=False, tools=[], documents=[], add_generation_prompt=True) == "Hi"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("enable_thinkng", "did you mean enable_thinking"),
        ("add_generation_promt", "did you mean add_generation_prompt"),
        ("stile", "did you mean style"),
        ("quux", "a variable of the chat template (the template reads"),
        ("thinking", "did you mean enable_thinking"),
        ("bos_token", "a variable of the chat template (the template reads"),
        ("raise_exception", ""),
    ],
)
def test_other_names_are_refused(name: str, hint: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name} is not a variable of the chat template") as caught:
        text(READS, **{name: True})
    assert hint in str(caught.value)
    assert str(caught.value).endswith(
        "(the template reads: add_generation_prompt, documents, enable_thinking, style, tools)"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tools": "f"}, "tools must be a list of dicts, not 'f'"),
        ({"tools": [len]}, r"tools\[0\] must be text, .*, not builtin_function"),
        ({"tools": ""}, "tools must be a list of dicts, not ''"),
        ({"documents": {}}, "documents must be a list of dicts, not {}"),
        ({"documents": ["x"]}, r"documents must be a list of dicts, not \['x'\]"),
        ({"enable_thinking": b"no"}, "enable_thinking must be text, a number, a list or a dict, not bytes"),
    ],
)
def test_values_are_plain_data(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        text(READS, **options)


def test_tools_that_the_template_does_not_read_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(byte_level(), {}, {"default": "{{ documents }}"})
    with caplog.at_level(logging.WARNING, "cuplama"):
        tokenizer.apply_chat(HI, documents=[{"a": 1}], tools=[])
        assert caplog.messages == []
        for _ in range(3):
            tokenizer.apply_chat(HI, tools=TOOLS)
        assert caplog.messages == ["the chat template does not read tools: the model will not see them"]


def test_template_variables() -> None:
    assert Tokenizer(byte_level()).template_variables == frozenset()
    assert Tokenizer(byte_level(), {}, {"default": "{{ a }}{{ messages }}"}).template_variables == {"a"}


# --- Which template -------------------------------------------------------------------------------


def test_a_template_by_name() -> None:
    named = {"default": "d", "tool_use": "t{{ tools }}", "rag": "r{{ style }}"}
    assert text(named) == "d"
    assert text(named, tools=[]) == "d"
    assert text(named, tools=[{}]) == "t[{}]"
    assert text(named, tools=[{}], chat_template="default") == "d"
    assert text(named, chat_template="rag", style="x") == "rx"
    with pytest.raises(TokenizerError, match=r"no chat template named 'rga' \(only default, tool_use, rag\)"):
        text(named, chat_template="rga")
    with pytest.raises(ParameterError, match="style is not a variable of the chat template"):
        text(named, style="x")


def test_additional_chat_templates(tmp_path: Path) -> None:
    folder = write(tmp_path, {"chat_template": "d"})
    (folder / "additional_chat_templates").mkdir()
    for name, source in (("tool_use.jinja", "t"), ("rag.jinja", "r"), ("README.md", "x")):
        (folder / "additional_chat_templates" / name).write_text(source)
    tokenizer = Tokenizer.load(folder)
    chats = [tokenizer.apply_chat(HI), tokenizer.apply_chat(HI, tools=[{}])]
    assert chats == [tokenizer.encode("d", bos=False), tokenizer.encode("t", bos=False)]
    assert tokenizer.apply_chat(HI, chat_template="rag") == tokenizer.encode("r", bos=False)
    (folder / "additional_chat_templates" / "rag.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"rag\.jinja: cannot be read"):
        Tokenizer.load(folder)


def test_no_template_names_models_that_have_one() -> None:
    with pytest.raises(TokenizerError, match="the model has no chat template") as caught:
        text({})
    assert all(name in str(caught.value) for name in MODELS_WITH_TEMPLATE)


# --- Going on from the last message ---------------------------------------------------------------

TRIMMED = CHATML.replace("m.content", "m.content | trim")
SPACED = "{% for m in messages %}[{{ m.content.strip() }} ]{% endfor %}"
PARTS = "{% for m in messages %}[{% for p in m.content %}{{ p.text }}{% endfor %}]{% endfor %}"
# A thinking model's: what comes before </think> is set apart, or dropped.
THINKING = (
    "{% for m in messages %}<|im_start|>{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<think>\n{{ r }}\n</think>\n\n{{ c }}<|im_end|>{% endfor %}"
)


def answer(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]


@pytest.mark.parametrize(
    ("template", "content", "end"),
    [
        (CHATML, "It is", "assistant\nIt is"),
        (CHATML, "It is ", "assistant\nIt is "),
        (CHATML, "", "assistant\n"),
        (TRIMMED, " It is ", "assistant\nIt is"),
        (TRIMMED, "It is", "assistant\nIt is"),
        (TRIMMED, "  \n", "assistant\n"),
        (SPACED, "It is \n", "[Q ][It is"),
        (CHATML, [{"type": "text", "text": "It"}, {"type": "text", "text": "is"}], "assistant\nIt\nis"),
        (PARTS, [{"type": "text", "text": "It "}, {"type": "text", "text": "is"}], "[Q][It is"),
        (PARTS, "It is", "[Q][It is"),
        (THINKING, "It is", "</think>\n\nIt is"),
        (THINKING, "<think>\nhm\n</think>\n\nIt is", "<think>\nhm\n</think>\n\nIt is"),
        (CHATML, "a<|im_end|>b", "assistant\na<|im_end|>b"),
        (TRIMMED, " <|im_end|> ", "assistant\n<|im_end|>"),
        (CHATML, "Q", "assistant\nQ"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "It is", '"Q""It is'),
    ],
)
def test_continue_final_message(template: str, content: Any, end: str) -> None:
    found = text(template, answer(content), continue_final_message=True)
    assert found.endswith(end)
    assert text(template, answer(content), add_generation_prompt=False).startswith(found)


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ messages[0].content }}", "It is"),  # leaves it out
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "It is"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "It is"),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", "hm</think>It is"),
        (THINKING, "hm</think>It is"),
    ],
)
def test_a_message_that_the_template_rewrites_cannot_be_continued(template: str, content: str) -> None:
    with pytest.raises(TokenizerError, match="continue_final_message: the chat template rewrites the last message"):
        text(template, answer(content), continue_final_message=True)


@pytest.mark.parametrize("name", ["<|end|>", "\ue000"])
def test_what_the_template_prints_behind_the_message_does_not_move_its_end(name: str) -> None:
    """Tools may hold private characters, or get them where they spell a control token."""
    tools = "{% for tool in tools %}{{ tool.name }}{% endfor %}"
    found = text(CHATML + tools, answer("It is"), tools=[{"name": name}], continue_final_message=True)
    assert found.endswith("assistant\nIt is")


def test_what_can_be_continued() -> None:
    silent = [*HI, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    with pytest.raises(TokenizerError, match="the last message has no text to go on from"):
        text(CHATML, silent, continue_final_message=True)
    with pytest.raises(ParameterError, match="excludes add_generation_prompt=True"):
        text(CHATML, HI, continue_final_message=True, add_generation_prompt=True)
    assert text(CHATML, HI, continue_final_message=True, add_generation_prompt=False).endswith("user\nHi")
