"""A chat's questions and answers, without a terminal: what is shown, kept, cut, left out and refused."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cuplama
from cuplama import Model
from cuplama.cli.chat_session import ChatSession
from cuplama.cli.conversation import Conversation
from cuplama.errors import ContextError, ParameterError, TokenizerError
from tests.tiny import CHARS, copy, load

EIGHT: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(talker: str) -> Iterator[Model]:
    """A character is a token, and the template adds three to each message: "u:Hi;"."""
    with cuplama.load(talker, device="numpy", context=80) as loaded:
        yield loaded


def session(model: Model, sampling: dict[str, Any] | None = None, **more: Any) -> ChatSession:
    return ChatSession(model, sampling or EIGHT, {}, Conversation(), **more)


def contents(chat: ChatSession) -> list[str]:
    return [m["content"] for m in chat.conversation.messages()]


class Keyboard(io.StringIO):
    """A stdout at which somebody presses Ctrl-C after some tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.left = tokens

    def write(self, text: str) -> int:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().write(text)


def test_answers_are_shown_and_kept(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    chat = session(model)
    first = model.chat([{"role": "user", "content": "Hi"}], **EIGHT).text
    assert chat.ask("Hi").text == first
    assert capfd.readouterr().out == f"{first}\n"
    second = model.chat([*chat.conversation.messages(), {"role": "user", "content": "there"}], **EIGHT).text
    assert chat.ask("there", show=False).text == second
    assert capfd.readouterr().out == ""
    assert contents(chat) == ["Hi", first, "there", second]


def test_a_cut_answer_is_said_to_be_one(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    session(model).ask("Hi")
    assert capfd.readouterr().err == "cuplama: the answer was cut at 8 tokens (-n 8)\n"
    answer = session(model, {"max_tokens": None, "ignore_eos": True}).ask("Hi")
    assert capfd.readouterr().err == "cuplama: the answer was cut: the context of 80 tokens is full (-c)\n"
    assert len(answer.tokens) == 80 - len("u:Hi;")
    session(model, {"max_tokens": 8, "stop": [answer.text[1]]}, stats=True).ask("Hi")  # ends by itself
    assert capfd.readouterr().err.startswith("prompt: 5 tokens in ")


def test_the_oldest_turns_are_left_out_where_an_answer_would_have_no_room(
    model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    chat = session(model, {"max_tokens": 4, "ignore_eos": True})
    for question in ("one", "two", "three"):  # 6 or 8 tokens, and 7 of the answer
        chat.ask(question)
    last = contents(chat)[4:]
    capfd.readouterr()
    answer = chat.ask("x" * 50).text
    left_out, cut = capfd.readouterr().err.splitlines()
    assert left_out.endswith("left out the 4 oldest messages: the conversation no longer fits the context of 80 tokens")
    assert "cut at 4 tokens" in cut
    assert contents(chat) == [*last, "x" * 50, answer]
    given = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), [*last, "x" * 50], strict=True)]
    assert answer == model.chat(given, max_tokens=4, ignore_eos=True).text


@pytest.mark.parametrize(("sampling", "room"), [({"max_tokens": None}, 20), ({"max_tokens": 4}, 4)])
def test_room_for_an_answer(model: Model, sampling: dict[str, Any], room: int) -> None:
    """A quarter of the context, or what -n asks for if that is less."""
    for length, kept in ((80 - room, 4), (80 - room + 1, 2)):
        chat = session(model, {**sampling, "ignore_eos": True})
        chat.conversation.add("one", "b")
        chat.ask("x" * (length - len("u:one;a:b;u:;")))
        assert len(chat.conversation.messages()) == kept


def test_a_question_that_is_too_long_changes_nothing(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    chat = session(model)
    chat.ask("Hi")
    before = contents(chat)
    capfd.readouterr()
    with pytest.raises(ContextError, match="the prompt has 93 tokens; the context has room for 79"):
        chat.ask("x" * 90)
    assert contents(chat) == before
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_keeps_the_half_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.chat([{"role": "user", "content": "Hi"}], **EIGHT).text
    chat = session(model)
    monkeypatch.setattr(sys, "stdout", Keyboard(4))
    answer = chat.ask("Hi")
    assert answer.finish_reason is None
    assert whole.startswith(answer.text)
    assert 3 <= len(answer.text) <= 4
    assert contents(chat) == ["Hi", answer.text]
    assert model.engine.cache.free == model.engine.cache.pages


def test_ctrl_c_before_the_answer_forgets_the_question(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    chat = session(model)
    monkeypatch.setattr(model.engine.runner, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Hi")
    assert contents(chat) == []


def test_what_no_question_can_mend_is_refused_before_the_first(model: Model, tmp_path: Path) -> None:
    session(model).check()
    with pytest.raises(ParameterError, match="logit_bias: token id 9999"):
        session(model, {"logit_bias": {9999: 1.0}}).check()
    with load(CHARS) as plain, pytest.raises(TokenizerError, match="no chat template"):
        session(plain).check()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}x"
    copy(CHARS, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(refusal)
    with load(tmp_path) as other, pytest.raises(TokenizerError, match="no system message"):
        ChatSession(other, EIGHT, {}, Conversation("Be nice")).check()
