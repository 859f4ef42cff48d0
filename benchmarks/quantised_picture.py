"""Draw tokens per second over the bytes of a token, a point for each format of weights.

    python -m benchmarks.quantised_picture FILE ... [--out docs/quantised.png]

Each FILE is what ``cuplama bench -o json`` wrote for one format, all of one model on one GPU; ``int4=FILE`` gives it
another name than its format's. Of its rows the one is drawn in which one sequence generates, after the fewest tokens. A
decode step reads every weight once, so the read peak is a line: bytes per second over bytes per token. Needs
matplotlib, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cuplama.errors import ParameterError
from cuplama.lab import report

__all__ = ["Point", "draw", "main", "read_point"]

_ROOF = "#222222"
_COLOURS = ("#8c2d04", "#d95f0e", "#5b8c3a", "#1f6f8b", "#3b2c85", "#777777", "#b8860b")
_MARKERS = "osD^vPX<"  # as many as have no divisor in common with the colours: no two points look the same
_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30)  # GB
_SPEEDS = (50, 100, 150, 200, 300, 400, 500, 600, 800, 1000, 1500, 2000, 3000, 5000)  # tokens per second
_NAMES = ("--weight-format", "--quantize")  # options of the command that say what the matrices of the layers hold


@dataclass(frozen=True)
class Point:
    """One format.

    name: of it; model, device: as the file has them; gigabytes: that a token reads; speed: tokens per second; percent:
    of the read bandwidth, which is ``read`` GB/s, measured in the same run.
    """

    name: str
    model: str
    device: str
    gigabytes: float
    speed: float
    percent: float
    read: float


def read_point(argument: str) -> Point:
    """The point of a file, ``FILE`` or ``NAME=FILE``. Raises ParameterError for a file without such a row."""
    label, _, file = argument.rpartition("=")
    path = Path(file)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [r for r in found["rows"] if r["generated_tokens"] and r["batch"] == 1]
        row = min(rows, key=lambda r: r["depth"])
        facts, speed, rate = found["environment"], row["tokens_per_second"], row["gigabytes_per_second"]
        return Point(
            label or _format(found, facts["dtype"]),
            facts["model"],
            facts["device"],
            rate / speed,
            speed,
            row["percent_of_read_bandwidth"],
            found["peaks"]["read_gigabytes_per_second"],
        )
    except OSError as e:
        raise ParameterError(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:  # a ValueError also where no row is left
        raise ParameterError(f"{path}: no row of cuplama bench -o json in which one sequence generates ({e})") from None


def _format(found: Mapping[str, Any], dtype: str) -> str:
    """What the matrices of the layers hold: the command says it, or else it is the dtype of the run."""
    words = [part for word in shlex.split(found.get("command", "")) for part in word.split("=", 1)]
    return next((after for name in _NAMES for word, after in pairwise(words) if word == name), dtype)


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the picture. Raises ParameterError for points of several models or devices, which no line joins."""
    for what in ("model", "device"):
        values = sorted({getattr(point, what) for point in points})
        if len(values) > 1:
            raise ParameterError(f"the files are of more than one {what}: {', '.join(values)}")
    figure = report.new_figure(9, 6)
    ax = figure.subplots()
    sizes, speeds = [p.gigabytes for p in points], [p.speed for p in points]
    least, most = min(p.read for p in points), max(p.read for p in points)
    low, high = min(sizes) / 1.25, max(sizes) * 1.25
    _draw_points(ax, points)
    ends = [low, high]
    ax.fill_between(ends, [least / x for x in ends], [most / x for x in ends], color="#bbbbbb", linewidth=0, zorder=1)
    ax.plot(ends, [(least + most) / 2 / x for x in ends], color=_ROOF, linewidth=2, zorder=2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(min(*speeds, least / high) / 1.2, most / low * 1.2)
    _number(ax.xaxis, _TICKS, low, high)
    _number(ax.yaxis, _SPEEDS, *ax.get_ylim())
    ax.set_xlabel("GB read for a token: every weight once, and the cache")
    ax.set_ylabel("tokens per second, one sequence")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper right", frameon=False, fontsize=9, title="tokens/s, and % of the read peak", alignment="left")
    ax.set_title(f"{points[0].model}: {points[0].device}", fontsize=11, loc="left")
    figure.canvas.draw()  # the axes must be final: the line's angle is one of pixels
    _name_roof(ax, low, least, most)
    report.save_figure(figure, path)


def _draw_points(ax: Any, points: Sequence[Point]) -> None:
    """A colour and a marker for each, which the legend names, from the fastest to the slowest."""
    for i, point in enumerate(sorted(points, key=lambda p: -p.speed)):
        name = f"{point.name}  {report.significant(point.speed, 3)}, {point.percent:.0f}%"
        look = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        ax.scatter(point.gigabytes, point.speed, s=60, edgecolor="white", linewidth=0.8, zorder=4, label=name, **look)


def _number(axis: Any, values: Sequence[float], low: float, high: float) -> None:
    shown = [value for value in values if low <= value <= high]
    axis.set_ticks(shown, [f"{value:g}" for value in shown])
    axis.set_ticks([], minor=True)


def _name_roof(ax: Any, low: float, least: float, most: float) -> None:
    """The peak below its line, along it."""
    at = low * 1.04
    start, end = ax.transData.transform([(at, least / at), (2 * at, least / at / 2)])
    angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
    shown = f"{least / 1e3:.2f}" + (f" to {most / 1e3:.2f}" if f"{least / 1e3:.2f}" != f"{most / 1e3:.2f}" else "")
    named = {"color": _ROOF, "fontsize": 10, "rotation": angle, "rotation_mode": "anchor", "va": "top"}
    ax.text(at, least / at * 0.98, f"read peak {shown} TB/s", **named)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE", help="of cuplama bench -o json, one for each format")
    parser.add_argument("--out", type=Path, default=Path("docs/quantised.png"), metavar="PICTURE")
    args = parser.parse_args()
    try:
        report.check_picture(args.out)
        draw([read_point(file) for file in args.files], args.out)
    except ParameterError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
