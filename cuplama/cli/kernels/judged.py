"""What ``bench`` and ``compare`` share: how a wrong kernel ends them, and what is said where no GPU can time it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ...errors import CompileError, ParameterError
from ..streams import say

__all__ = ["checked_row", "print_checked", "refusing"]


@contextmanager
def refusing() -> Iterator[None]:
    """A wrong kernel ends with its case on stderr and exit status 1, where other errors have status 2.

    Arrays that do not fit into memory are such an error: the shape's, or the model's.
    """
    from ...lab.check import WrongResultError

    try:
        yield
    except (WrongResultError, CompileError) as e:
        say(f"refused: {e}")
        sys.exit(1)
    except MemoryError as e:
        raise ParameterError(f"the shape is too large for the memory here: {e}") from e


def checked_row(op: str, dtype: str, cases: int | None, result: str) -> dict[str, Any]:
    """What the emulator found of an op, by stable names."""
    return {"op": op, "dtype": dtype, "cases": cases, "emulator": result}


def print_checked(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print such rows as JSON or CSV."""
    from ...lab import report

    click.echo(report.render((), rows, form, {"command": report.command()}), nl=False)
