"""How measurements are shown: one list of rows as a Markdown table, CSV or JSON, and as a picture.

Field names are stable: scripts read them. A row is a mapping from field to value; None is "not measured" everywhere.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ParameterError

__all__ = [
    "FORMATS",
    "Column",
    "Row",
    "check_picture",
    "command",
    "counted",
    "make_room",
    "new_figure",
    "render",
    "save_figure",
    "significant",
]

FORMATS = ("md", "json", "csv")
_ROUNDS, _MARGIN = 4, 0.01  # attempts to make room for labels; the share of the axes that stays free behind them
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the Markdown table. spread: a field that follows the value as ± where it is there."""

    field: str
    title: str
    digits: int | None = None  # significant digits of a number; None: the value as it is
    spread: str | None = None

    def text(self, row: Row) -> str:
        """The cell of a row, as text."""
        value = row[self.field]
        if value is None:
            return "-"
        shown = significant(value, self.digits) if self.digits is not None else str(value)
        if self.spread is None or row[self.spread] is None:
            return shown
        places = len(shown.partition(".")[2])
        return f"{shown} ± {row[self.spread]:.{places}f}"


def significant(value: float, digits: int) -> str:
    """A number with that many significant digits, never in scientific notation, and never fewer than the integer's."""
    if value == 0:
        return "0"
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def render(columns: Sequence[Column], rows: Sequence[Row], form: str, extra: Mapping[str, Any] | None = None) -> str:
    """The rows in a form of ``FORMATS``. extra: what the JSON object holds beside the rows.

    Markdown shows the columns; JSON and CSV hold every field, unrounded.
    """
    if form == "json":
        return json.dumps({**(extra or {}), "rows": [dict(r) for r in rows]}, indent=1, ensure_ascii=False) + "\n"
    if form == "csv":
        out = io.StringIO()
        if rows:
            writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return out.getvalue()
    cells = [[c.title for c in columns], *([c.text(r) for c in columns] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [c.digits is not None for c in columns]
    lines = [
        "| " + " | ".join(t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, widths, numbers, strict=True)) + " |"
        for line in cells
    ]
    rule = (
        "|" + "|".join("-" * (w + 1) + ":" if n else "-" * (w + 2) for w, n in zip(widths, numbers, strict=True)) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def command() -> str:
    """The command line of this process, to be kept with what it measured."""
    return shlex.join(["cuplama", *sys.argv[1:]])


def counted(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def new_figure(width: float, height: float) -> Any:
    """An empty figure that no window shows. Raises ParameterError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ParameterError("--plot needs matplotlib; pip install 'cuplama[plot]'") from None
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def make_room(ax: Any, labels: Sequence[Any]) -> None:
    """Widen a linear x axis that begins at 0 until labels behind bars end inside the axes.

    A label has a width in pixels and begins where its bar ends, so a longer axis moves it to the left.
    """
    for _ in range(_ROUNDS):  # other parts of a picture move with the numbers at an axis
        ax.figure.canvas.draw()
        page = ax.get_window_extent()
        needed = 1.0
        for label in labels:
            box = label.get_window_extent()
            room = page.width - box.width - _MARGIN * page.width
            needed = max(needed, (box.x0 - page.x0) / max(room, _MARGIN * page.width))
        ax.set_xlim(0, ax.get_xlim()[1] * needed)
        if needed == 1:
            return


def check_picture(path: Path) -> None:
    """Refuse before the work a picture that could not be written after it. Raises ParameterError."""
    kinds = sorted(new_figure(1, 1).canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ParameterError(f"cannot write {path}: the name must end in one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise ParameterError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ParameterError(f"cannot write {path}: permission denied")


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture; the name's ending says which kind. Raises ParameterError if that cannot be."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as e:
        raise ParameterError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None
