"""The chat's commands, and what is a question although it looks like one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cuplama.cli.chat_session import ChatSession
from cuplama.cli.conversation import Conversation
from cuplama.cli.repl import repl
from cuplama.errors import PromptError

Say = Callable[..., tuple[list[str], str]]


class Parrot(ChatSession):
    """A session without a model, which answers with the number of the question."""

    def __init__(self, system: str | None = None) -> None:
        config, backend = SimpleNamespace(architecture="LlamaForCausalLM"), SimpleNamespace(describe=lambda: "NumPy 9")
        model: Any = SimpleNamespace(config=config, backend=backend, context=80)
        super().__init__(model, {}, {}, Conversation(system))
        self.asked: list[str] = []

    def ask(self, question: str, show: bool = True) -> Any:
        self.asked.append(question)
        if question == "wrong":
            raise PromptError("no such question")
        if question == "early":
            raise KeyboardInterrupt
        self.conversation.add(question, str(len(self.asked)))
        return SimpleNamespace(finish_reason=None if question == "late" else "stop")


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Say:
    """Type texts, and leave: (the conversation's messages, stderr without the banner)."""

    def call(*texts: str, session: Parrot | None = None) -> tuple[list[str], str]:
        session = session or Parrot()

        def typed() -> Iterator[str]:
            yield from texts

        monkeypatch.setattr("cuplama.cli.repl.typed_texts", typed)
        monkeypatch.setattr("cuplama.cli.repl.line_history", contextlib.nullcontext)
        repl(session, "some-model")
        out, err = capfd.readouterr()
        assert out == ""
        banner, _, rest = err.partition("\n")
        assert banner == "cuplama: some-model (LlamaForCausalLM) on NumPy 9, context 80. /help lists the commands."
        return [m["content"] for m in session.conversation.messages()], rest

    return call


@pytest.mark.parametrize(
    "text",
    ["Hi", "help me", "hlep", "/no_think", "/think about it", "/etc/hosts", "/", "// a comment", "one\ntwo"],
)
def test_what_is_not_a_command_is_a_question(text: str, say: Say) -> None:
    assert say(text) == ([text, "1"], "")


@pytest.mark.parametrize("text", ["/help", "/exit", "/clear", "/system x"])
def test_a_command_behind_a_space_is_a_question(text: str, say: Say) -> None:
    assert say(f" {text}") == ([text, "1"], "")


def test_indented_code_stays_indented(say: Say) -> None:
    code = "    if x:\n        y()"
    assert say(code) == ([code, "1"], "")


@pytest.mark.parametrize(
    ("text", "usage"),
    [
        ("/hlep", "/help"),
        ("/hlep me", "/help"),
        ("exit", "/exit"),
        ("/help me", "/help"),
        ("/clear the table", "/clear"),
        ("/exit now", "/exit"),
        ("/exit\nor not", "/exit"),
        ("/sytem Be nice", "/system TEXT"),
    ],
)
def test_what_is_almost_a_command_is_a_question_with_a_hint(text: str, usage: str, say: Say) -> None:
    assert say(text) == ([text, "1"], f"cuplama: this is sent as a question; the command would be {usage}\n")


@pytest.mark.parametrize("leave", ["/exit", "/quit", "/bye"])
def test_leaving(leave: str, say: Say) -> None:
    assert say("Hi", leave, "not read") == (["Hi", "1"], "")


def test_help_names_every_command(say: Say) -> None:
    messages, err = say("/help")
    assert messages == []
    assert all(f"\n{command} " in f"\n{err}" for command in ("/help", "/clear", "/system", "/undo", "/retry", "/exit"))


def test_clear_and_system(say: Say) -> None:
    assert say("/clear")[1] == "cuplama: the conversation is forgotten\n"
    assert say("/system terse")[1] == "cuplama: the conversation is forgotten, and there is a new system message\n"
    assert say("/system")[1] == "cuplama: the conversation is forgotten, and there is no system message\n"
    assert say("Hi", "/clear", "there", session=Parrot("nice"))[0] == ["nice", "there", "2"]
    assert say("Hi", "/system be\nterse", "there", session=Parrot("nice"))[0] == ["be\nterse", "there", "2"]
    assert say("Hi", "/system", "there", session=Parrot("nice"))[0] == ["there", "2"]


def test_undo_and_retry(say: Say) -> None:
    assert say("one", "two", "/undo") == (["one", "1"], "took back: two\n")
    assert say("one", "two", "/retry") == (["one", "1", "two", "3"], "")
    assert say("/undo", "/retry") == ([], "there is no question yet\n" * 2)


def test_what_goes_wrong_is_said_and_the_conversation_stands(say: Say) -> None:
    assert say("one", "wrong", "two") == (["one", "1", "two", "3"], "cuplama: no such question\n")
    forgotten = "\ncuplama: stopped before the answer began; the question is forgotten\n"
    assert say("one", "early", "two") == (["one", "1", "two", "3"], forgotten)
    kept = "cuplama: stopped; what was said so far stays in the conversation\n"
    assert say("late", "two") == (["late", "1", "two", "2"], kept)
