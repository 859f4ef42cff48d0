"""How commands print: text, JSON, tables, lines for people, progress."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

__all__ = [
    "QUIET_KEY",
    "is_quiet",
    "no_warnings",
    "notice",
    "print_json",
    "print_table",
    "progress_bar",
    "say",
    "say_progress",
    "size_text",
    "visible",
    "write_text",
]

QUIET_KEY = "cuplama.quiet"  # of the click context's meta: whether --quiet was given
# Control characters -> what stands for them on a terminal: Unicode's pictures of them, or U+FFFD where it has none.
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def visible(text: str) -> str:
    """A text that controls no terminal: of control characters tab and line break stay, others become pictures."""
    return text.translate(_PICTURES)


def write_text(text: str) -> None:
    """Write a piece of text to stdout, at once.

    A terminal gets it as ``visible`` has it: what a model says must not move the cursor, rename the window or write to
    the clipboard. A file or a pipe gets it as it is.
    """
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line for people on stderr, where it does not spoil what a program reads."""
    click.echo(visible(text), err=True)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep what is less than an error out of the log for a while, other libraries' warnings included."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def is_quiet() -> bool:
    """Whether --quiet was given."""
    context = click.get_current_context(silent=True)
    return context is not None and QUIET_KEY in context.meta


def say_progress(text: str) -> None:
    """Say how far long work has come; --quiet leaves it out."""
    if not is_quiet():
        say(text)


def notice(text: str) -> None:
    """Say what nobody has to heed, in the form of the log's lines; --quiet leaves it out."""
    say_progress(f"cuplama: {text}")


def print_json(facts: Mapping[str, Any] | Sequence[Any], indent: int | None = None) -> None:
    """Print one JSON value; raises ValueError for an infinity, which JSON does not have.

    It is ASCII, with escapes for the rest: that is right whatever the encoding of the locale is.
    """
    click.echo(json.dumps(facts, allow_nan=False, indent=indent))


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


def size_text(count: float) -> str:
    """A number of bytes for people, in units of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in a terminal and without --quiet only, once the work has lasted half a second.

    Yields a function of (done, total), both counted in ``unit``; "B" is bytes. The bar goes when all is done, so that
    what is printed afterwards has the terminal to itself.
    """
    if is_quiet() or not sys.stderr.isatty():
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
        if done >= total:
            stop()
        elif time.perf_counter() - begin > 0.5:
            bar.start()

    def stop() -> None:
        if bar.live.is_started:  # stopping prints an empty line on a dumb terminal
            bar.stop()

    try:
        yield update
    finally:
        stop()
