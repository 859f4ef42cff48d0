"""Latency over load, as a table and as a picture, from what ``benchmarks.serve`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cuplama.lab import report

__all__ = ["draw", "table"]

_COLOURS = {"p50": "#1f6f8b", "p95": "#d95f0e", "p99": "#8c2d04"}
_PANELS = (("first_token_ms", "to the first token"), ("between_tokens_ms", "between tokens"))
_NAMED = {"p50": -10, "p99": 10}  # those whose values are written, so many points above the line
_DIGITS = 3


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each load."""

    def cells(level: Mapping[str, Any]) -> list[str]:
        times = [
            " / ".join(report.significant(level[name][p], _DIGITS) for p in _COLOURS)
            for name in ("first_token_ms", "between_tokens_ms", "whole_ms")
        ]
        rates = (level["requests_per_second"], level["output_tokens_per_second"])
        return [f"{level['share']:.0%}", *(report.significant(r, 4) for r in rates), *times]

    head = ["load", "requests/s", "tokens/s", "first token", "between tokens", "whole answer"]
    lines = [head, ["---", *["--:"] * 5], *map(cells, result["levels"])]
    found = result["capacity"]
    rate = report.significant(found["requests_per_second"], 4)
    tokens = report.significant(found["output_tokens_per_second"], 4)
    foot = f"ms at p50 / p95 / p99. The whole is {rate} requests/s, {tokens} output tokens/s."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{foot}\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each of two times, over the load. Raises ParameterError where the file cannot be written."""
    report.check_picture(path)
    levels: Sequence[Mapping[str, Any]] = result["levels"]
    loads = [100 * level["share"] for level in levels]
    figure = report.new_figure(10, 4.2)
    for ax, (name, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for p, colour in _COLOURS.items():
            values = [level[name][p] for level in levels]
            ax.plot(loads, values, color=colour, marker="o", linewidth=2, label=p)
            for x, y in zip(loads, values, strict=True) if p in _NAMED else ():
                text, at = report.significant(y, _DIGITS), (0, _NAMED[p])
                how = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
                ax.annotate(text, (x, y), at, color=colour, **how)
        ax.set_yscale("log")
        for which, formatter in (("major", "{x:g}"), ("minor", "")):
            getattr(ax.yaxis, f"set_{which}_formatter")(formatter)
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.margins(x=0.08, y=0.15)
        ax.set_xticks(loads, [f"{x:.0f}%" for x in loads])
        ax.set_xlabel("load, of the capacity")
        ax.set_ylabel("milliseconds")
        ax.set_title(f"Time {title}", fontsize=11, loc="left")
        ax.grid(True, axis="y", which="major", color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
    facts, found = result["environment"], result["capacity"]
    rate = report.significant(found["requests_per_second"], 3)
    title = f"{result['model']} on {facts.get('device', 'a server')}: 100% is {rate} requests a second"
    figure.suptitle(title, fontsize=10)
    report.save_figure(figure, path)
