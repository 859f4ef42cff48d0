"""What was said in a chat: turns that can be added, taken back, and left out when they no longer fit the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Conversation", "Message"]

Message = dict[str, str]


@dataclass
class Conversation:
    """The system message, if there is one, and the turns after it.

    A turn is a question and all that follows up to the next one. Turns are kept and left out whole, because templates
    refuse a conversation in which an answer has lost its question.
    """

    system: str | None = None
    turns: list[list[Message]] = field(default_factory=list)

    def messages(self, question: str | None = None, skip: int = 0) -> list[Message]:
        """All messages for a chat template, without the oldest ``skip`` turns and with a new question at the end."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        end = [] if question is None else [{"role": "user", "content": question}]
        return [*start, *(message for turn in self.turns[skip:] for message in turn), *end]

    def fit(self, question: str, encode: Callable[[Sequence[Message]], list[int]], limit: int) -> tuple[list[int], int]:
        """The ids of the conversation with a question, and how many of the oldest turns they leave out.

        As few as possible, so that there are at most ``limit`` ids; if the question alone has more, these. Nothing is
        changed: ``forget`` does that, once the question has been accepted.
        """
        ids: list[int] = []
        for skip in range(len(self.turns) + 1):
            ids = encode(self.messages(question, skip))
            if len(ids) <= limit:
                return ids, skip
        return ids, len(self.turns)

    def add(self, question: str, answer: str) -> None:
        """Add a turn."""
        self.turns.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])

    def forget(self, turns: int) -> int:
        """Leave the oldest turns out for good; how many messages that were."""
        left_out = sum(map(len, self.turns[:turns]))
        del self.turns[:turns]
        return left_out

    def undo(self) -> str | None:
        """Take the last turn back; its question, or None if there is no turn."""
        return self.turns.pop()[0]["content"] if self.turns else None

    def restart(self, system: str | None) -> None:
        """Forget every turn, and begin again with this system message or without one."""
        self.system = system
        self.turns.clear()
