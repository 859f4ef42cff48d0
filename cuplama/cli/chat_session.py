"""A chat with a model: how a question becomes a prompt that fits, and how its answer is shown and kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from ..completion import Completion, Delta
from ..model import Model
from .conversation import Conversation, Message
from .running import say_if_cut, speed
from .streams import notice, progress_bar, say, write_text

__all__ = ["ChatSession"]

_ANSWER_ROOM = 1024  # tokens; older turns are left out before an answer has less room than this


@dataclass
class ChatSession:
    """A model, what it is asked with, and what was said.

    sampling: parameters of the answers, as ``Model.stream`` takes them; template: tools, documents and variables of the
    chat template, as ``Tokenizer.apply_chat`` takes them; stats: print tokens and speed after each answer.
    """

    model: Model
    sampling: dict[str, Any]
    template: dict[str, Any]
    conversation: Conversation
    stats: bool = False

    @property
    def where(self) -> str:
        """What the banner says behind the model's name."""
        model = self.model
        return f"({model.config.architecture}) on {model.backend.describe()}, context {model.context}"

    def check(self) -> None:
        """Refuse before the first question what no question could make right.

        Raises TokenizerError for a model without a template, and ParameterError for variables that its template does
        not have and for sampling parameters.
        """
        self.model.params(**self.sampling)
        self._encode(self.conversation.messages("Hi"))

    def ask(self, question: str, show: bool = True) -> Completion:
        """Answer a question, on stdout as it comes if it is to be shown, and keep both.

        If Ctrl-C stops it, what was said so far is kept and finish_reason is None. Raises KeyboardInterrupt if nothing
        was said, and CuplamaError for a question that cannot be answered: neither is kept.
        """
        ids, skipped = self.conversation.fit(question, self._encode, self._longest_prompt())
        with progress_bar("reading the prompt", "tokens") as progress:
            stream = self.model.stream(ids, progress=progress, **self.sampling)
            if skipped:
                self._leave_out(skipped)
            begun = list(islice(stream, 1))
        try:
            _write(chain(begun, stream), show)
        except KeyboardInterrupt:
            stream.close()
        answer = stream.completion
        if answer.finish_reason is None and not answer.text:
            raise KeyboardInterrupt
        if show and not answer.text.endswith("\n"):
            write_text("\n")
        self.conversation.add(question, answer.text)
        say_if_cut(answer)
        if self.stats:
            say(speed(answer.timings))
        return answer

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.model.tokenizer.apply_chat(messages, **self.template)

    def _longest_prompt(self) -> int:
        """Tokens that a conversation may have: the context less room for an answer, at most a quarter of it."""
        context, limit = self.model.context, self.model.params(**self.sampling).max_tokens
        return context - min(_ANSWER_ROOM, context // 4, context if limit is None else limit)

    def _leave_out(self, turns: int) -> None:
        messages = self.conversation.forget(turns)
        notice(
            f"left out the {messages} oldest messages: "
            f"the conversation no longer fits the context of {self.model.context} tokens"
        )


def _write(deltas: Iterable[Delta], show: bool) -> None:
    for delta in deltas:
        if show:
            write_text(delta.text)
