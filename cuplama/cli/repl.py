"""The chat in a terminal: questions and commands are typed, and answered one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Protocol

from ..errors import CuplamaError
from .conversation import Conversation
from .streams import notice, say
from .typed import line_history, typed_texts

__all__ = ["Answer", "Session", "repl"]

_HELP = """\
/help          this list
/clear         forget the conversation (the system message stays)
/system TEXT   set the system message and forget the conversation; without TEXT, remove it
/undo          take the last question and its answer back
/retry         answer the last question again
/exit          leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next; lines pasted together are one question.
Anything else is a question, also /no_think or /etc/hosts; a line that begins with a space is never a command."""


class Answer(Protocol):
    """What a question gave. finish_reason: None where it was stopped."""

    @property
    def finish_reason(self) -> str | None: ...


class Session(Protocol):
    """What answers questions. where: behind the model's name, what and where it is; ask: answers and keeps both."""

    conversation: Conversation

    @property
    def where(self) -> str: ...

    def ask(self, question: str) -> Answer: ...


def repl(session: Session, name: str) -> None:
    """Answer what is typed, until /exit or Ctrl-D. name: what the banner calls the model."""
    notice(f"{name} {session.where}. /help lists the commands.")
    with line_history():
        for text in typed_texts():
            word, _, rest = text.partition(" ")
            if text in _LEAVE:
                return
            if word in _COMMANDS and (not rest or word == "/system"):
                _COMMANDS[word](session, rest.strip())
            else:
                _hint(text)
                _ask(session, _question(text))


def _question(text: str) -> str:
    """What is asked: the text, indented code too, without the space that keeps it from being a command."""
    bare = text.lstrip()
    return bare if bare.startswith("/") else text


def _ask(session: Session, question: str) -> None:
    """Answer a question; whatever goes wrong, the conversation before it stands."""
    try:
        if session.ask(question).finish_reason is None:
            notice("stopped; what was said so far stays in the conversation")
    except KeyboardInterrupt:
        say("")  # the line that has the terminal's ^C
        notice("stopped before the answer began; the question is forgotten")
    except CuplamaError as e:
        say(f"cuplama: {e}")


def _hint(text: str) -> None:
    """Say so where a text is almost a command, or one without its slash: it is sent to the model all the same."""
    names, word = [*_COMMANDS, *_LEAVE], text.partition(" ")[0]
    near = get_close_matches(word if word.startswith("/") else f"/{text}", names, 1, cutoff=0.75)
    if near and (word.startswith("/") or near[0] == f"/{text}"):
        usage = "/system TEXT" if near[0] == "/system" else near[0]
        notice(f"this is sent as a question; the command would be {usage}")


def _clear(session: Session, _: str) -> None:
    session.conversation.restart(session.conversation.system)
    notice("the conversation is forgotten")


def _system(session: Session, text: str) -> None:
    session.conversation.restart(text or None)
    notice(f"the conversation is forgotten, and there is {'a new' if text else 'no'} system message")


def _undo(session: Session, _: str) -> None:
    question = session.conversation.undo()
    say("there is no question yet" if question is None else f"took back: {' '.join(question.split()):.60}")


def _retry(session: Session, _: str) -> None:
    question = session.conversation.undo()
    if question is None:
        say("there is no question yet")
    else:
        _ask(session, question)


_LEAVE = ("/exit", "/quit", "/bye")
_COMMANDS: Mapping[str, Callable[[Session, str], None]] = {
    "/help": lambda session, _: say(_HELP),
    "/clear": _clear,
    "/system": _system,
    "/undo": _undo,
    "/retry": _retry,
}
