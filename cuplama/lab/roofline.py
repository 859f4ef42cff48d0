"""The roofline picture: how fast each kernel computes, under what the memory and the arithmetic allow.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model for multicore architectures",
CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from . import report

__all__ = ["plot_roofline"]


# Colour, marker and name of the points of a graph: they can be told apart without colours as well.
_GRAPHS = {
    "decode": ("#1f6f8b", "o", "decode step"),
    "prefill": ("#c8553d", "s", "prompt"),
    "": ("#5b8c3a", "^", "ops"),
}

_NAME = {"fontsize": 8}  # of a name beside its point


def plot_roofline(found: Mapping[str, Any], path: Path) -> None:
    """Operations per second against operations per byte, both logarithmic, under the two measured peaks.

    found: a result of the lab. One point per op and weight that computes; of several shapes, the one that takes most
    of the time. Raises ParameterError if no op computes.
    """
    read, peak = found["peaks"]["read_gigabytes_per_second"] * 1e9, found["peaks"]["matrix_teraflops"] * 1e12
    points = _points(found["rows"])
    if not points:
        raise ParameterError("no op of this table computes, so there is nothing to draw")
    x = [p["operations"] / p["bytes"] for p in points]
    y = [p["teraflops"] * 1e12 for p in points]
    figure = report.new_figure(11, 6.5)
    ax = figure.subplots()
    low, high = min(*x, peak / read) / 4, max(*x, peak / read) * 25
    ridge = peak / read
    ax.plot([low, ridge, high], [low * read, peak, peak], color="#222222", linewidth=2, zorder=2)
    ax.fill_between([low, ridge, high], [low * read, peak, peak], y2=peak * 30, color="#f3f1ec", zorder=0)
    for graph, (colour, marker, name) in _GRAPHS.items():
        chosen = [i for i, p in enumerate(points) if p["graph"] == graph]
        if chosen:
            at = [x[i] for i in chosen], [y[i] for i in chosen]
            ax.scatter(*at, s=46, c=colour, marker=marker, edgecolor="white", linewidth=0.8, zorder=4, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(min(*y, low * read) / 10, peak * 4)  # room for names below the points
    ax.set_xlabel("operations per byte of memory traffic")
    ax.set_ylabel("operations per second")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6, zorder=1)
    ax.spines[["top", "right"]].set_visible(False)
    if len({p["graph"] for p in points}) > 1:
        ax.legend(loc="lower right", frameon=False, title="% of the roof at that intensity", alignment="right")
    facts = found["environment"]
    model = f"{facts['model']}, " if "model" in facts else ""
    ax.set_title(f"{model}{facts['dtype']}, every kernel timed alone: {facts['device']}", fontsize=12, loc="left")
    figure.canvas.draw()
    # The axes must be final: names are placed in pixels.
    named_points = [(a, b, _point_name(p), _GRAPHS[p["graph"]][0]) for a, b, p in zip(x, y, points, strict=True)]
    _label(ax, named_points, lambda intensity: min(peak, intensity * read))
    angle = _slope(ax, low, read)
    start = low * 1.25
    named = {"fontsize": 10, "color": "#222222"}
    bandwidth = f"read bandwidth {read / 1e12:.2f} TB/s"
    ax.text(start, start * read * 1.25, bandwidth, rotation=angle, rotation_mode="anchor", **named)
    product = f"{found['peaks']['matrix_dtype']} matrix product {peak / 1e12:.0f} TFLOP/s"
    ax.text(high / 1.2, peak * 1.15, product, ha="right", **named)
    report.save_figure(figure, path)


def _points(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    best: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for r in rows:
        key = (r["graph"], r["op"], r["weights"])
        if r["operations"] and (key not in best or r["total_microseconds"] > best[key]["total_microseconds"]):
            best[key] = r
    return list(best.values())


def _point_name(p: Mapping[str, Any]) -> str:
    """ "linear (up) 83%": of what the roof allows at its intensity."""
    near = max(p["percent_of_read_bandwidth"], p["percent_of_matrix_rate"])
    return f"{p['op']}{f' ({name})' if (name := p['weights']) else ''} {near:.0f}%"


def _slope(ax: Any, low: float, read: float) -> float:
    """The angle of the bandwidth line on the page, in degrees."""
    a, b = ax.transData.transform([(low, low * read), (low * 10, low * 10 * read)])
    return math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))


def _label(ax: Any, points: Sequence[tuple[float, float, str, str]], roof: Callable[[float], float]) -> None:
    """A name right of each point, a thin line between the two. Names of a cluster stand in a column, from its top down,
    so that none covers another, and all stay under the roof."""
    pixels = ax.figure.dpi / 72
    height, gap = 12 * pixels, 14 * pixels  # of a line, and between point and name
    widths = [_width(ax, p[2]) for p in points]
    at = [tuple(ax.transData.transform(p[:2])) for p in points]
    boxes = [(x - gap / 3, x + gap / 3, y) for x, y in at]  # left, right and middle of what must not be covered
    page = ax.get_window_extent()
    for cluster in _clusters(at, 70 * pixels):
        left = min(max(at[i][0] for i in cluster) + gap, page.x1 - max(widths[i] for i in cluster) - gap / 2)
        edge = ax.transData.inverted().transform((left, 0))[0]
        top = ax.transData.transform((edge, roof(edge)))[1] - 0.8 * height
        middle = float("inf")
        for i in sorted(cluster, key=lambda i: -at[i][1]):
            right = left + widths[i]
            middle = min(middle - height, at[i][1], top)
            while any(left < r and right > l and abs(middle - m) < height for l, r, m in boxes):
                middle -= height / 4
            boxes.append((left, right, middle))
            x, y = ax.transData.inverted().transform((left, middle))
            ax.plot([points[i][0], x], [points[i][1], y], color=points[i][3], linewidth=0.5, alpha=0.6, zorder=3)
            ax.text(x, y, f" {points[i][2]}", color=points[i][3], va="center_baseline", zorder=5, **_NAME)


def _width(ax: Any, name: str) -> float:
    """Pixels that a name takes, the space ahead of it included."""
    text = ax.text(0, 0, f" {name}", transform=ax.transAxes, **_NAME)
    width = float(text.get_window_extent().width)
    text.remove()
    return width


def _clusters(at: Sequence[tuple[float, ...]], reach: float) -> list[list[int]]:
    """Numbers of points that are near each other, directly or over others."""
    left = set(range(len(at)))
    found = []
    while left:
        cluster, edge = [], [left.pop()]
        while edge:
            i = edge.pop()
            cluster.append(i)
            near = {j for j in left if abs(at[i][0] - at[j][0]) < reach and abs(at[i][1] - at[j][1]) < reach}
            left -= near
            edge += near
        found.append(cluster)
    return found
