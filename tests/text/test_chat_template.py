"""Chat templates: the two real ones against transformers' own rendering, and everything a template may use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from cuplama.errors import TokenizerError
from cuplama.text.chat_template import render
from cuplama.text.tokenizer import Tokenizer
from tests.paths import DATA

# Written once with apply_chat_template(..., tokenize=False) of transformers 5.23.
GOLDEN = json.loads((DATA / "tokenizers/chats.json").read_text(encoding="utf-8"))
HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['tokenizer']}-{case['chat']}")
def test_as_transformers(shared: Path, case: dict[str, Any]) -> None:
    template = (shared / "templates" / f"{case['template']}.jinja").read_text(encoding="utf-8")
    names = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
    assert render(template, **{name: case[name] for name in names if name in case}) == case["text"]


def test_whitespace_rules() -> None:
    template = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.role }}: {{ m['content'] }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(template, HI) == "user: Hi\n"


def test_loop_controls() -> None:
    skip_1, stop_at_3 = "{% if i == 1 %}{% continue %}{% endif %}", "{% if i == 3 %}{% break %}{% endif %}"
    template = f"{{% for i in range(9) %}}{skip_1}{stop_at_3}{{{{ i }}}}{{% endfor %}}"
    assert render(template, HI) == "02"


def test_generation_block_sees_the_loop_and_prints_its_body() -> None:
    template = "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% endgeneration %}{% endfor %}!"
    assert render(template, HI) == "1Hi!"


def test_tojson_is_plain_json() -> None:
    value = [{"name": "<ü> & 'x'", "b": 1, "a": None}]
    assert render("{{ tools | tojson }}", HI, tools=value) == """[{"name": "<ü> & 'x'", "b": 1, "a": null}]"""
    assert render("{{ tools[0].b | tojson(indent=2) }}", HI, tools=value) == "1"
    template = "{{ tools | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
    assert render(template, HI, tools=value) == """[{"a":null,"b":1,"name":"<\\u00fc> & 'x'"}]"""


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}", HI) in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_special_tokens_and_extra_variables() -> None:
    template = "{{ bos_token }}{{ mode }}{{ eos_token }}"
    assert render(template, HI, bos_token="<s>", eos_token="</s>", mode="x") == "<s>x</s>"
    assert render(template, HI) == ""  # never the word None


def test_generation_prompt() -> None:
    template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert render(template, HI) == "Hi>"
    assert render(template, HI, add_generation_prompt=False) == "Hi"


BAD_TEMPLATES = {
    "{{ raise_exception('Roles must\n alternate') }}": "Roles must alternate",
    "{% for m in messages %}": "line 1",
    "{{ messages[3].content }}": "list object has no element 3",
    "{{ none + 'x' }}": "unsupported operand",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
}


@pytest.mark.parametrize(("template", "reason"), BAD_TEMPLATES.items())
def test_template_errors_are_one_line(template: str, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as caught:
        render(template, HI)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("chat template")


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("Hi", "messages must be a list of dicts, not str"),
    ({"role": "user", "content": "Hi"}, "messages must be a list of dicts, not dict"),
    ([], "messages is empty"),
    (["Hi"], r"messages\[0\] must be a dict"),
    ([*HI, {"content": "Hi"}], r"messages\[1\] has no 'role'"),
    ([{"role": "user"}], r"messages\[0\] has no 'content'"),
    ([{"role": 1, "content": "Hi"}], r"messages\[0\]\['role'\] must be a string, not 1"),
    ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] must be a string or a list .*, not None"),
    ([{"role": "user", "content": b"Hi"}], r"messages\[0\]\['content'\] must be a string or .*, not b'Hi'"),
    ([{"role": "user", "content": ["Hi"]}], r"messages\[0\]\['content'\]\[0\] must be {\"type\": \"text\""),
    ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\['content'\]\[0\]\['text'\] must be a string"),
    ([{**HI[0], "tool_calls": "f()"}], r"messages\[0\]\['tool_calls'\] must be a list of dicts, not 'f\(\)'"),
    ([{**HI[0], "name": b"x"}], r"messages\[0\]\['name'\] must be text, a number, a list or a dict, not bytes"),
    ([{**HI[0], "x": {1: 2}}], r"messages\[0\]\['x'\] has a key that is not a string: 1"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_messages_are_checked(messages: Any, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        render("", messages)


def test_a_tool_call_needs_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert render("{{ messages[0].tool_calls[0].name }}", [message]) == "f"


# --- Through the tokenizer ------------------------------------------------------------------------

LLAMA = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}{{ eos_token }}"


def words(folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    """A folder with a word-level tokenizer that puts <s> before every text."""
    vocabulary = {"<s>": 0, "</s>": 1, "Hi": 2, "?": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_no_double_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(words(tmp_path, {"chat_template": LLAMA}))
    assert tokenizer.encode("Hi") == [0, 2]
    assert tokenizer.apply_chat(HI) == [0, 2, 1]


def test_a_template_without_bos_gets_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(words(tmp_path, {"chat_template": "{{ messages[0].content }}"}))
    assert tokenizer.apply_chat(HI) == [2]


def test_options_reach_the_template(tmp_path: Path) -> None:
    source = "{% if add_generation_prompt %}Hi{% endif %}{% if think %} Hi{% endif %}"
    tokenizer = Tokenizer.load(words(tmp_path, {"chat_template": source}))
    assert tokenizer.apply_chat(HI) == [2]
    assert tokenizer.apply_chat(HI, add_generation_prompt=False, think=True) == [2]
    assert tokenizer.apply_chat(HI, think=True) == [2, 2]


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "Hi Hi"}, {"name": "default", "template": "Hi"}]
    tokenizer = Tokenizer.load(words(tmp_path, {"chat_template": named}))
    assert tokenizer.chat_template == "Hi"
    assert tokenizer.apply_chat(HI) == [2]
    assert tokenizer.apply_chat(HI, tools=[{"name": "f"}]) == [2, 2]


def test_named_templates_without_default(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(words(tmp_path, {"chat_template": [{"name": "rag", "template": "Hi"}]}))
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match=r"no chat template named 'default' \(only rag\)"):
        tokenizer.apply_chat(HI)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no chat template: use generate .* chat_template\.jinja"):
        Tokenizer.load(words(tmp_path)).apply_chat(HI)


def test_which_file_wins(tmp_path: Path) -> None:
    words(tmp_path, {"chat_template": "config"})
    places: Sequence[tuple[str, str, str]] = [
        ("chat_template.json", '{"chat_template": "json"}', "json"),
        ("chat_template.jinja", "jinja", "jinja"),
    ]
    assert Tokenizer.load(tmp_path).chat_template == "config"
    for name, text, expected in places:
        (tmp_path / name).write_text(text)
        assert Tokenizer.load(tmp_path).chat_template == expected
