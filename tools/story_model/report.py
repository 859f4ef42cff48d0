"""The logs of the runs as a line, a file and a picture. Needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.story_model.runs import ALL_RUNS

__all__ = ["report", "summary"]


def summary(result: Mapping[str, Any]) -> str:
    """A line about a finished run."""
    last = result["history"][-1]
    return (
        f"{result['run']['name']:24} {result['parameters'] / 1e6:6.2f} M  held {result['held_bits_per_byte']:.4f}"
        f"  val {result['val_bits_per_byte']:.4f}  last {last['held_bits']:.4f}  train {last['train_nats']:.3f} nats"
        f"  epochs {result['epochs']:5.1f}  {last['seconds']:.0f} s"
    )


def report(args: argparse.Namespace) -> None:
    """Gather the logs of all runs into one JSON file and draw their held-out loss."""
    import matplotlib.pyplot as plt

    results = [json.loads((Path(args.out) / f"{name}.json").read_text()) for name in ALL_RUNS if
               (Path(args.out) / f"{name}.json").exists()]  # fmt: skip
    Path(args.runs).write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for result in results:
        name = result["run"]["name"]
        style = next(v for k, v in {"teacher": "--", "small": ":", "student": "-"}.items() if name.startswith(k))
        history = result["history"]
        axes.plot([h["tokens"] / 1e6 for h in history], [h["held_bits"] for h in history], style, label=name)
    axes.set(xlabel="tokens seen, millions", ylabel="held-out bits per byte", ylim=(0.55, 0.9))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(args.picture, dpi=90)
    for result in results:
        print(summary(result))
