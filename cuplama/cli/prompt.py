"""Where a command's text comes from: an argument, -p, -f, a file, or standard input where somebody pipes into it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import PromptError
from .options import Decorator, options

__all__ = ["file_options", "file_text", "prompt_options", "prompt_text", "read_file", "read_text"]


def _file_option(text: str) -> Decorator:
    path = click.Path(path_type=Path)
    return click.option("-f", "--file", "file_option", type=path, metavar="FILE", help=text)


def prompt_options(name: str = "PROMPT") -> Decorator:
    """The parameters "prompt", "prompt_option" and "file_option" for ``prompt_text``. name: what the help calls it."""
    return options(
        click.argument("prompt", required=False, metavar=f"[{name}]"),
        click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help=f"{name} as an option."),
        _file_option(f'{name} from a file ("-": standard input).'),
    )


def prompt_text(prompt: str | None, prompt_option: str | None, file_option: Path | None, name: str = "PROMPT") -> str:
    """The text that was given in one of these ways, "-" for standard input, or piped into the command.

    A line break that ends a file or standard input is not part of it. Standard input is touched only if it is asked
    for or nothing else is given: a job without one, as of cron, may have it closed. Raises UsageError for a text that
    is given twice or not at all, and PromptError for one that cannot be read.
    """
    _only_one(**{name: prompt, "-p": prompt_option, "-f": file_option})
    if prompt_option is not None:
        return prompt_option
    if file_option is not None:
        return _without_line_end(read_file(file_option))
    if prompt is not None:
        return read_text(prompt)
    text = read_text("-") if _piped() else ""
    if not text:
        raise click.UsageError(f"Missing argument '{name}': give it, -p TEXT or -f FILE, or pipe it in")
    return text


# The parameters "file" and "file_option" for ``file_text``.
file_options: Decorator = options(
    click.argument("file", required=False, type=click.Path(path_type=Path)), _file_option("FILE as an option.")
)


def file_text(file: Path | None, file_option: Path | None) -> str:
    """All of the file that was given in one of these ways, or of what is piped into the command.

    Raises UsageError and PromptError as ``prompt_text`` does.
    """
    _only_one(**{"FILE": file, "-f": file_option})
    source = file if file is not None else file_option
    if source is None and not _piped():
        raise click.UsageError("Missing argument 'FILE': give it or -f FILE, or pipe a text in")
    return read_file(source or Path("-"))


def read_text(source: str) -> str:
    """An argument as it is; "-" is standard input, without the newline that ends it. Raises PromptError."""
    return source if source != "-" else _without_line_end(_standard_input())


def read_file(file: Path) -> str:
    """A file's text, to the last byte; "-" is standard input. Raises PromptError naming file, byte and offset."""
    if str(file) == "-":
        return _standard_input()
    try:
        data = file.read_bytes()
    except OSError as e:
        raise PromptError(f"cannot read {file}: {e.strerror}") from None
    return _decoded(data, file)


def _standard_input() -> str:
    """All of standard input, to the last byte. Raises PromptError."""
    if sys.stdin is None:  # `cuplama ... <&-`
        raise PromptError("standard input is closed")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, name: object) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise PromptError(f"{name} is not valid UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}") from None


def _without_line_end(text: str) -> str:
    """A text without the line break that editors and echo put at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def _piped() -> bool:
    return sys.stdin is not None and not sys.stdin.isatty()


def _only_one(**values: object) -> None:
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"the same is given {len(given)} times, by {' and '.join(given)}; give it once")
