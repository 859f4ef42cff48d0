"""The answer that a completion holds, with tags that its text does not show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cuplama
from cuplama.hub import find_model
from cuplama.model import Model

TEMPLATE = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% if enable_thinking %}
<think>
{% endif %}{% endif %}{# <tool_call> </think> #}"""
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
USER = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled model with a chat template, and tags that are special tokens."""
    folder, bundled = tmp_path_factory.mktemp("chat"), find_model(None, True)
    for file in bundled.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    taken = {token["content"]: token for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    for id, tag in zip(sorted(vocab.values())[-2:], ("<tool_call>", "</tool_call>"), strict=True):
        assert id not in {token["id"] for token in taken.values()}
        [old] = [piece for piece, number in vocab.items() if number == id]
        del vocab[old]
        tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(_pair(m)) != old]
        vocab[tag] = id
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer["added_tokens"].append({"id": id, "content": tag, **flags})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with cuplama.load(folder, device="numpy") as model:
        yield model


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def completed(model: Model, text: str, **options: Any) -> cuplama.Completion:
    """A completion as the model would have made it, had it written this text."""
    ids = model.tokenizer.encode(text, bos=False)
    found: cuplama.Completion = model.chat(USER, max_tokens=1, temperature=0, **options)
    return replace(found, text=model.decode(ids), tokens=ids, finish_reason="stop")


def test_tags_that_are_special_tokens_are_seen(model: Model) -> None:
    completion = completed(model, "Let me look." + CALL)
    assert "<tool_call>" not in completion.text
    answer = cuplama.read_answer(model, completion, TOOLS)
    assert (answer.content.strip(), answer.reasoning) == ("Let me look.", "")
    [call] = answer.tool_calls
    assert (call.name, call.arguments) == ("time", "{}")
    assert answer.to_message()["tool_calls"] == [
        {"id": call.id, "type": "function", "function": {"name": "time", "arguments": "{}"}}
    ]
    plain = cuplama.read_answer(model, completion)
    assert plain.tool_calls == []
    assert plain.content.strip() == "Let me look." + CALL


def test_reasoning_that_the_prompt_began(model: Model) -> None:
    answer = cuplama.read_answer(model, completed(model, "So 2.</think>\n\nTwo.", enable_thinking=True))
    assert (answer.reasoning.strip(), answer.content) == ("So 2.", "Two.")
    assert answer.to_message() == {"role": "assistant", "content": "Two.", "reasoning_content": answer.reasoning}


def test_what_ended_the_text_is_not_in_it(model: Model) -> None:
    completion = model.chat(USER, max_tokens=20, stop=["a"], temperature=0)
    assert completion.finish_reason == "stop"
    assert cuplama.read_answer(model, completion).content == completion.text
    cut = model.chat(USER, max_tokens=3, temperature=0)
    assert cuplama.read_answer(model, cut).content == cut.text


def test_the_answer_goes_into_the_conversation(model: Model, tmp_path: Path) -> None:
    answer = cuplama.read_answer(model, completed(model, "x" + CALL), TOOLS)
    messages = [*USER, answer.to_message(), {"role": "tool", "content": "ten", "tool_call_id": answer.tool_calls[0].id}]
    assert model.chat(messages, tools=TOOLS, max_tokens=2).tokens
