"""What was said in a chat: which messages a question comes with, and which no longer fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cuplama.cli.conversation import Conversation, Message
from cuplama.errors import TokenizerError


def said(*pairs: str, system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    for pair in pairs:
        conversation.add(*pair.split("|"))
    return conversation


def words(messages: Sequence[Message]) -> str:
    return " ".join(f"{m['role'][0]}:{m['content']}" for m in messages)


def encode(messages: Sequence[Message]) -> list[int]:
    return [0] * sum(len(m["content"]) for m in messages)


def test_messages() -> None:
    conversation = said("one|1", "two|2", system="nice")
    assert words(conversation.messages()) == "s:nice u:one a:1 u:two a:2"
    assert words(conversation.messages("three")) == "s:nice u:one a:1 u:two a:2 u:three"
    assert words(conversation.messages("three", skip=1)) == "s:nice u:two a:2 u:three"
    assert words(conversation.messages("three", skip=2)) == "s:nice u:three"
    assert words(said("one|1").messages()) == "u:one a:1"


@pytest.mark.parametrize(
    ("limit", "skip", "size"),
    [(30, 0, 17), (17, 0, 17), (16, 1, 13), (13, 1, 13), (12, 2, 9), (9, 2, 9), (8, 2, 9), (0, 2, 9)],
)
def test_the_oldest_turns_are_left_out_and_the_system_message_stays(limit: int, skip: int, size: int) -> None:
    """As few as possible; a question that does not fit alone is there all the same, for the model to refuse."""
    conversation = said("one|1", "two|2", system="nice")
    assert conversation.fit("three", encode, limit) == ([0] * size, skip)
    assert len(conversation.turns) == 2  # nothing is forgotten before the question is accepted
    assert conversation.forget(skip) == 2 * skip
    assert words(conversation.messages()) == " ".join(["s:nice", *["u:one a:1", "u:two a:2"][skip:]])


def test_what_belongs_to_a_turn_goes_with_it() -> None:
    conversation = said("one|1")
    conversation.turns[0][1:1] = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "result"}]
    conversation.add("two", "2")
    assert words(conversation.messages("three", skip=1)) == "u:two a:2 u:three"
    assert conversation.forget(1) == 4


def test_a_template_that_refuses_leaves_the_conversation_alone() -> None:
    def refuse(messages: Sequence[Message]) -> list[int]:
        raise TokenizerError("no")

    conversation = said("one|1")
    with pytest.raises(TokenizerError):
        conversation.fit("two", refuse, 0)
    assert words(conversation.messages()) == "u:one a:1"


def test_undo_and_restart() -> None:
    conversation = said("one|1", "two|2", system="nice")
    assert conversation.undo() == "two"
    assert words(conversation.messages()) == "s:nice u:one a:1"
    assert conversation.undo() == "one"
    assert conversation.undo() is None
    conversation.add("one", "1")
    conversation.restart("terse")
    assert words(conversation.messages("Hi")) == "s:terse u:Hi"
    conversation.restart(None)
    assert words(conversation.messages("Hi")) == "u:Hi"
