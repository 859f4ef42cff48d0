"""What commands read from standard input and files, and how they print: text, JSON, tables, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import PromptError

__all__ = ["print_json", "print_table", "progress_bar", "read_file", "read_text", "say"]


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


def read_text(source: str) -> str:
    """An argument as it is; "-" is standard input, without the newline that ends it. Raises PromptError."""
    return source if source != "-" else _standard_input().removesuffix("\n").removesuffix("\r")


def read_file(file: Path) -> str:
    """A file's text, to the last byte; "-" is standard input. Raises PromptError naming file, byte and offset."""
    if str(file) == "-":
        return _standard_input()
    try:
        data = file.read_bytes()
    except OSError as e:
        raise PromptError(f"cannot read {file}: {e.strerror}") from None
    return _decoded(data, file)


def say(text: str) -> None:
    """Print a line for people on stderr, where it does not spoil what a program reads."""
    click.echo(text, err=True)


def print_json(facts: dict[str, Any], indent: int | None = None) -> None:
    """Print one JSON object; raises ValueError for an infinity, which JSON does not have."""
    click.echo(json.dumps(facts, ensure_ascii=False, allow_nan=False, indent=indent))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: with rules and colours on a terminal, in plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in a terminal only, once the work has lasted half a second.

    Yields a function of (done, total), both counted in ``unit``; "B" is bytes.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress as rich
    from rich.console import Console

    sizes = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    counts = sizes if unit == "B" else (rich.MofNCompleteColumn(), rich.TextColumn(unit))
    columns = (rich.TextColumn(description), rich.BarColumn(), *counts, rich.TimeRemainingColumn())
    bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    task, begin = bar.add_task(description), time.perf_counter()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done < total and time.perf_counter() - begin > 0.5:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:  # stopping prints an empty line on a dumb terminal
            bar.stop()
