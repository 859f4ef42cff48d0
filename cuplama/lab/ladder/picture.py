"""The ladder as a picture: time over the length, both logarithmic, a line for each rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ParameterError
from .. import report

__all__ = ["plot_ladder"]

_COLOURS = ("#8c2d04", "#d95f0e", "#5b8c3a", "#1f6f8b", "#3b2c85", "#777777")


def plot_ladder(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """rows: of ``climb``, of one or more lengths. Raises ParameterError if none has a time."""
    names = list(dict.fromkeys(row["rung"] for row in rows))
    lines = {
        name: sorted((r["s"], r["milliseconds"]) for r in rows if r["rung"] == name and r["milliseconds"] is not None)
        for name in names
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        raise ParameterError("no rung of this table has a time, so there is nothing to draw")
    figure = report.new_figure(9, 6)
    ax = figure.subplots()
    lengths = sorted({s for points in lines.values() for s, _ in points})
    for name, colour in zip(names, _COLOURS, strict=False):
        if name in lines:
            style = "--" if name == "torch" else "-"
            ax.plot(*zip(*lines[name], strict=True), style, marker="o", markersize=5, color=colour, linewidth=1.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(lengths[0] / 1.3, lengths[-1] * 2.6)  # room for the names, right of the lines
    ax.set_xticks(lengths, [f"{s:,}" for s in lengths])
    ax.minorticks_off()
    ax.set_xlabel("tokens")
    ax.set_ylabel("milliseconds")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=11, loc="left")
    figure.canvas.draw()  # the axes must be final: names are placed in pixels
    _name_lines(ax, [(name, lines[name][-1], _COLOURS[names.index(name) % len(_COLOURS)]) for name in lines])
    report.save_figure(figure, path)


def _name_lines(ax: Any, ends: Sequence[tuple[str, tuple[int, float], str]]) -> None:
    """Each line's name right of its last point, none over another."""
    gap, below = 13 * ax.figure.dpi / 72, float("-inf")
    for name, (s, milliseconds), colour in sorted(ends, key=lambda e: e[1][1]):
        x, y = ax.transData.transform((s, milliseconds))
        below = max(y, below + gap)
        at = ax.transData.inverted().transform((x + gap, below))
        ax.text(*at, f"{name}  {report.significant(milliseconds, 3)} ms", color=colour, fontsize=9, va="center")
