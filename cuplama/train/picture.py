"""``loss.png``: the losses of a run over its steps. Where it cannot be drawn the run goes on without."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .log import read_log
from .saving import UNFINISHED

__all__ = ["draw_losses"]

_log = logging.getLogger("cuplama")
_POINTS = 400  # of a curve: more are drawn as means of their neighbours
_SIZE = (8, 4.5)  # inches, of 120 points


def draw_losses(folder: Path) -> str | None:
    """Draw ``loss.png`` from ``log.jsonl``; why it was not drawn, or None if it was."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "loss.png is not drawn without matplotlib; pip install 'cuplama[plot]'"
    try:
        _draw(Figure(figsize=_SIZE, dpi=120, layout="constrained"), folder)
    except Exception as e:  # whatever goes wrong in a picture must not end a training
        return f"loss.png was not drawn: {' '.join(str(e).split())}"
    return None


def _draw(figure: Any, folder: Path) -> None:
    rows = list(read_log(folder / "log.jsonl"))
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    width = -(-len(rows) // _POINTS)
    axes = figure.subplots()
    label = "loss" if width <= 1 else f"loss, mean of {width} steps"
    axes.plot(_means(steps, width), _means(losses, width), color="tab:blue", linewidth=1, label=label)
    measured = [r for r in rows if "eval_loss" in r]
    if measured:
        places, values = [r["step"] for r in measured], [r["eval_loss"] for r in measured]
        axes.plot(places, values, color="tab:orange", marker="o", markersize=3, label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    other = path.with_name(path.name + UNFINISHED)
    figure.savefig(other, format="png")
    other.replace(path)


def _means(values: Sequence[float], width: int) -> list[float]:
    """The mean of each ``width`` neighbours."""
    return [sum(part) / len(part) for part in (values[i : i + width] for i in range(0, len(values), max(1, width)))]
