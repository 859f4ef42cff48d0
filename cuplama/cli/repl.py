"""``cuplama chat``: the conversation in a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ..completion import Timings
from ..errors import ContextError, CuplamaError, PromptError
from ..model import Model

__all__ = ["repl"]

_HELP = """\
/help          this list
/clear         forget the conversation (the system message stays)
/system TEXT   set the system message and forget the conversation; without TEXT, remove it
/exit          leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


def repl(model: Model, params: dict[str, Any], system: str | None, stats: Callable[[Timings], str] | None) -> None:
    """Read a line, answer it, until /exit or the end of input.

    Raises TokenizerError if the model has no template and ParameterError for parameters that it cannot have. Where
    nobody types, a question that cannot be answered is an error as well: there the answers that follow would be wrong.
    """
    if sys.stdin is None:  # `cuplama chat <&-`
        raise PromptError("standard input is closed")
    model.params(**params)  # before the first question, not after it
    conversation: list[dict[str, str]] = []
    start = [{"role": "system", "content": system}] if system else []
    model.tokenizer.apply_chat(
        [*start, {"role": "user", "content": "Hi"}]
    )  # no template: say so before the first question
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(f"{model.config.architecture} on {model.backend.describe()}. /help lists the commands.", err=True)
    with _history() if interactive else contextlib.nullcontext():
        for line in _lines(interactive):
            command, _, rest = line.partition(" ")
            if command in ("/exit", "/quit", "/bye"):
                return
            if command == "/help":
                click.echo(_HELP, err=True)
            elif command == "/clear":
                conversation.clear()
            elif command == "/system":
                start = [{"role": "system", "content": rest}] if rest else []
                conversation.clear()
            elif command.startswith("/") and "/" not in command[1:]:
                click.echo(f"{command} is not a command; /help lists them", err=True)
            else:
                conversation.append({"role": "user", "content": line})
                try:
                    answer = _answer(model, [*start, *conversation], params, stats)
                except CuplamaError as e:
                    if not interactive:
                        raise
                    hint = " (/clear starts again)" if isinstance(e, ContextError) else ""
                    click.echo(f"cuplama: {e}{hint}", err=True)
                    answer = None
                if answer is None:
                    conversation.pop()  # the question could not be asked; the conversation before it stands
                else:
                    conversation.append({"role": "assistant", "content": answer})


def _answer(
    model: Model, messages: list[dict[str, str]], params: dict[str, Any], stats: Callable[[Timings], str] | None
) -> str | None:
    """Stream an answer to stdout. Returns its text, as far as it came; None if it could not begin."""
    text = ""
    try:
        stream = model.stream_chat(messages, **params)
        try:
            for delta in stream:
                text += delta.text
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stream.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stats is not None:
            click.echo(stats(stream.timings), err=True)
    except KeyboardInterrupt:  # before the answer began
        return None
    return text


def _lines(interactive: bool) -> Iterator[str]:
    """Lines typed, joined at a trailing backslash; empty ones are skipped. Ctrl-C drops the line, Ctrl-D ends."""
    held = ""
    while True:
        try:
            prompt = (". " if held else "> ") if interactive else ""
            if not sys.stdout.isatty():  # input() would write it among the answers
                click.echo(prompt, nl=False, err=True)
                prompt = ""
            line = input(prompt)
        except EOFError:
            if interactive:
                click.echo(err=True)
            if held.strip():
                yield held.strip()
            return
        except UnicodeDecodeError as e:
            raise PromptError(f"standard input is not valid UTF-8: byte 0x{e.object[e.start]:02x}") from None
        except KeyboardInterrupt:
            held = ""
            click.echo("\n(/exit or Ctrl-D leaves)", err=True)
            continue
        if line.endswith("\\"):
            held += line[:-1] + "\n"
            continue
        line, held = (held + line).strip(), ""
        if line:
            yield line


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with a history that survives the session, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = Path(click.get_app_dir("cuplama")) / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
