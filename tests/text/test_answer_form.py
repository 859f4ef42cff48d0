"""Which form a model's answers have is told by its chat template, or else by its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuplama.errors import ParameterError
from cuplama.text.answer_form import AnswerForm, find_form
from cuplama.text.reasoning import REASONING_FORMATS
from cuplama.text.tokenizer import Tokenizer
from cuplama.text.tool_calls.formats import TOOL_FORMATS
from tests.text.test_control_tokens import byte_level

# Pieces of real templates: (what the template has, tokens, tools, reasoning).
TEMPLATES: list[tuple[str, list[str], str, str | None]] = [
    ("<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>", [], "hermes", None),
    ("{{- '<tool_call>' }} ... {%- if '</think>' in content %}", [], "hermes", "think"),
    ("<tool_call>\n<function=example_function_name>\n<parameter=a>", [], "qwen-xml", None),
    ("<seed:tool_call>\n<function=example_function_name> <seed:think>", [], "seed", "seed"),
    ("'<|tool_call>call:' + function['name'] <|channel>thought\n<channel|>", [], "gemma", "gemma"),
    ("<|tool_call_start|>[' <think>' </think>", [], "lfm", "think"),
    ("<function_calls></function_calls> XML tags <think>", ["</think>"], "olmo", "think"),
    ("<|start|>assistant<|channel|>analysis<|message|>", [], "harmony", "harmony"),
    ("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }} [THINK]", [], "mistral-args", "mistral"),
    ("[TOOL_CALLS] [{{ calls }}]", ["[ARGS]"], "mistral", None),
    ("'<|tool_call|>' ~ calls", [], "tool-call-token", None),
    ("<|tool|>{{ tools }}<|/tool|>", ["<|tool_call|>"], "functools", None),
    ("Use exact format: [func_name1(param1=value1)]", ["<|python_start|>"], "pythonic", None),
    ('Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}',
     ["<|python_start|>"], "llama-json", None),
    ("{{ messages }}", ["<|tool_call_start|>", "<think>", "</think>"], "lfm", "think"),
    ("{{ messages }}", [], "llama-json", None),
    ("", [], "llama-json", None),
]  # fmt: skip


@pytest.mark.parametrize(("template", "tokens", "tools", "reasoning"), TEMPLATES)
def test_the_form_that_a_template_tells(template: str, tokens: list[str], tools: str, reasoning: str | None) -> None:
    form = find_form(template, tokens)
    assert form.tools == TOOL_FORMATS[tools]
    assert form.reasoning == (None if reasoning is None else REASONING_FORMATS[reasoning])


def test_a_real_template(shared: Path) -> None:
    source = (shared / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    assert find_form(source, []) == AnswerForm(None, TOOL_FORMATS["hermes"])


def test_a_form_that_is_chosen() -> None:
    assert find_form("<tool_call>", [], tools="mistral", reasoning="think") == AnswerForm(
        REASONING_FORMATS["think"], TOOL_FORMATS["mistral"]
    )
    assert find_form("<tool_call></think>", [], tools="none", reasoning="none") == AnswerForm()
    with pytest.raises(ParameterError, match="tool_format = 'x' is not supported; supported: none, seed, "):
        find_form("", [], tools="x")
    with pytest.raises(ParameterError, match="reasoning_format = 'x'"):
        find_form("", [], reasoning="x")


def test_special_tokens_that_tags_have() -> None:
    backend = byte_level()
    backend.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "[INST]"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.answer_form == AnswerForm(None, TOOL_FORMATS["mistral-args"])
    ids = tokenizer.special_in(tokenizer.answer_form.texts)
    assert [tokenizer.piece(id) for id in ids] == ["[TOOL_CALLS]", "[ARGS]"]
    assert {tokenizer.special_texts[text] for text in ("[TOOL_CALLS]", "[ARGS]")} == set(ids)
    tokenizer.choose_form(reasoning="think", tools="none")
    assert tokenizer.answer_form == AnswerForm(REASONING_FORMATS["think"], None)
    with pytest.raises(ParameterError, match="tool_format = 'x'"):
        tokenizer.choose_form(tools="x")


def test_texts_have_no_empty_ones() -> None:
    for form in (find_form("", [], tools=name, reasoning="harmony") for name in TOOL_FORMATS):
        assert form.texts
        assert all(form.texts)
    assert AnswerForm().texts == ()
