"""What somebody types into a terminal: lines with a history, and pasted lines that belong together."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from .streams import say

__all__ = ["line_history", "typed_texts"]

_PASTE_SECONDS = 0.05  # lines of a paste follow each other within this time; nobody types a second line so fast


def typed_texts() -> Iterator[str]:
    """What is typed, text by text, until Ctrl-D; blank ones are skipped. Ctrl-C drops what is being typed.

    A text is a line; a line that ends in a backslash goes on in the next, and lines that are pasted together are one
    text. Leading spaces are kept.
    """
    held = ""
    while True:
        try:
            text = _line_or_paste(". " if held else "> ")
        except EOFError:
            say("")
            if held.strip():
                yield held.rstrip()
            return
        except UnicodeDecodeError as e:
            say(f"cuplama: what was typed is not valid UTF-8: byte 0x{e.object[e.start]:02x}")
            continue
        except KeyboardInterrupt:
            held = ""
            say("\n(/exit or Ctrl-D leaves)")
            continue
        if text.endswith("\\"):
            held += text[:-1] + "\n"
            continue
        text, held = (held + text).rstrip(), ""
        if text:
            yield text


def _line_or_paste(prompt: str) -> str:
    """A line, and those that came with it. The last of a paste may have no end yet: then it can be edited."""
    lines = [_line(prompt)]
    with contextlib.suppress(EOFError):
        while _more_is_waiting():
            lines.append(_line(". "))
    return "\n".join(lines)


def _line(prompt: str) -> str:
    """A line from the terminal. The prompt goes to stderr where ``input`` would write it among the answers."""
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)
    return input()


def _more_is_waiting() -> bool:
    with contextlib.suppress(OSError, ValueError):  # where a terminal cannot be waited for, a paste is several texts
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    return False


@contextlib.contextmanager
def line_history() -> Iterator[None]:
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
