"""``Model.chat`` and its kin on a model that draws at random: what is asked of it, not what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cuplama import Model
from cuplama.chat import ChatOptions
from cuplama.errors import ParameterError, PromptError, TokenizerError
from cuplama.sampling_params import PARAMETERS, SamplingParams
from tests.paths import ROOT
from tests.tiny import CHARS, copy, load

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if tools %}{{ tools[0].name }}{% endif %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking is false %}no{% endif %}{{ style }}{{ seed }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = copy(CHARS, tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with load(folder) as found:
        yield found


PROMPTS: list[tuple[Any, str]] = [
    ({}, "u:Hi;a:It is;a:"),
    ({"enable_thinking": False}, "u:Hi;a:It is;a:no"),
    ({"tools": [{"name": "f"}], "add_generation_prompt": False}, "u:Hi;a:It is;f"),
    ({"continue_final_message": True}, "u:Hi;a:It is"),
    ({"template_args": {"style": "x", "seed": "y"}, "seed": 3}, "u:Hi;a:It is;a:xy"),
    ({"template_args": {"enable_thinking": False, "add_generation_prompt": True}}, "u:Hi;a:It is;a:no"),
    ({"style": "x", "template_args": {"style": "y"}}, "u:Hi;a:It is;a:x"),
]


@pytest.mark.parametrize(("options", "prompt"), PROMPTS)
def test_what_reaches_the_template(model: Model, options: dict[str, Any], prompt: str) -> None:
    assert model.encode_chat(CHAT, **options) == model.encode(prompt)
    wanted = model.generate(prompt, max_tokens=5)
    done = model.chat(CHAT, max_tokens=5, **options)
    assert (done.text, done.tokens) == (wanted.text, wanted.tokens)
    assert "".join(delta.text for delta in model.stream_chat(CHAT, max_tokens=5, **options)) == wanted.text


def test_chat_takes_what_generate_takes(model: Model) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.5, seed=3)
    prompt = model.encode_chat(CHAT)
    assert model.chat(CHAT, params).tokens == model.generate(prompt, params).tokens
    assert model.chat(CHAT, params, seed=4).tokens == model.generate(prompt, params, seed=4).tokens
    several = [completion.tokens for completion in model.generate(prompt, params, n=3)]
    assert [completion.tokens for completion in model.chat(CHAT, params, n=3)] == several
    with model.stream_chat(CHAT, params, n=3) as stream:
        assert [delta.index for delta in stream].count(2) == 4
    assert [completion.tokens for completion in stream.completions] == several


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1}, "^temprature is neither a sampling .* nor a variable .*; did you mean temperature?"),
        ({"enable_thinkng": False}, "^enable_thinkng is neither .*; did you mean enable_thinking?"),
        ({"special_txt": True}, "did you mean special_text?"),
        (
            {"quux": 1, "max_tokens": 2},
            r"quux is neither .* chat template \(the template reads: add_gen.*, style, tools",
        ),
        ({"template_args": {"quux": 1}}, "quux is neither"),
        ({"template_args": {"special_text": 1, "template_args": {}}}, "template_args"),
        ({"template_args": ["style"]}, r"template_args = \['style'\]: it must be a mapping"),
        ({"template_args": {1: 2}}, "it must be a mapping of variables' names"),
        ({"max_tokens": -1}, "max_tokens = -1"),
    ],
)
def test_options_that_nobody_knows(model: Model, options: Any, words: str) -> None:
    for call in (model.chat, model.stream_chat):
        with pytest.raises(ParameterError, match=words):
            call(CHAT, **options)


@pytest.mark.parametrize("name", ["special_text", "chat_template", "template_args"])
def test_variables_of_a_template_cannot_be_options(name: str, model: Model) -> None:
    """A server may fill template_args with what a client sends, who must not choose what special tokens mean."""
    with pytest.raises(ParameterError, match=f"^template_args: {name} is not a variable of a template"):
        model.encode_chat(CHAT, template_args={name: True})


def test_errors_of_the_messages_and_the_prompt(model: Model, chars: Model) -> None:
    with pytest.raises(TokenizerError, match=r"messages\[0\] has no 'role'"):
        model.encode_chat([{"content": "Hi"}])
    with pytest.raises(PromptError, match="not valid Unicode"):
        model.encode_chat([{"role": "user", "content": "\ud800"}])
    for call in (chars.chat, chars.stream_chat, chars.encode_chat):
        with pytest.raises(TokenizerError, match="no chat template"):
            call(CHAT)


def test_chat_options_have_the_sampling_parameters_and_no_other_field_of_that_name() -> None:
    assert ChatOptions.__optional_keys__ >= set(PARAMETERS)
    assert ChatOptions.__required_keys__ == frozenset()


def test_progress(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    model.chat(CHAT, max_tokens=1, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert list(model.stream_chat(CHAT, max_tokens=0)) == []


def test_a_folder_with_named_templates(tmp_path: Path) -> None:
    folder = copy(CHARS, tmp_path)
    (folder / "chat_template.jinja").write_text("d:")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("r:{{ style }}")
    with load(folder) as model:
        assert model.encode_chat(CHAT, chat_template="rag", template_args={"style": "x"}) == model.encode("r:x")
        with pytest.raises(ParameterError, match="style is neither"):
            model.encode_chat(CHAT, template_args={"style": "x"})


def test_the_programs_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "chat.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5
    folder = copy(CHARS, tmp_path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ style }}:")
    with load(folder) as model:
        monkeypatch.setattr("cuplama.load", lambda name: model)
        exec("\n".join(blocks), {})
