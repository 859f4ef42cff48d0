"""The roofline picture, and pictures that cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import ParameterError
from cuplama.lab import kernel_bench, report, roofline
from cuplama.lab.timing import Spread
from cuplama.lab.workloads import decode_workloads, prompt_workloads
from cuplama.models.presets import find_shape
from tests.lab.common import PEAKS, needs_matplotlib


def _made_up() -> dict[str, Any]:
    config = find_shape("llama-3.2-1b")[1]
    rows = []
    for case in decode_workloads(config, "bf16") + prompt_workloads(config, "bf16"):
        floor = max(case.call.nbytes() / PEAKS.read, case.call.flops() / PEAKS.arithmetic)
        rows.append(kernel_bench.row(case, Spread((floor / 0.8,)), None, PEAKS))
    facts = {"model": "llama-3.2-1b", "device": "a GPU", "dtype": "bf16", "date": "2026-11-20"}
    return {"environment": facts, "peaks": PEAKS.fields(), "rows": rows}


@needs_matplotlib
def test_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    made = report.new_figure

    def kept(width: float, height: float) -> Figure:
        figures.append(made(width, height))
        return figures[-1]

    monkeypatch.setattr(report, "new_figure", kept)
    found = _made_up()
    roofline.plot_roofline(found, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    (ax,) = figures[0].axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    names = [t for t in ax.texts if re.search(r"\d%$", t.get_text())]
    computing = {(r["graph"], r["op"], r["weights"]) for r in found["rows"] if r["operations"]}
    assert len(names) == len(computing)
    wanted = {"linear_add (down_proj) 80%", "attention 80%", "append_attention 80%"}
    assert {t.get_text().strip() for t in names} >= wanted
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "labels cover each other"
    page = ax.get_window_extent(renderer)
    assert all(b.x1 <= page.x1 and b.y0 >= page.y0 for b in boxes), "a label leaves the picture"


def test_nothing_to_draw(tmp_path: Path) -> None:
    found = _made_up()
    found["rows"] = [r for r in found["rows"] if not r["operations"]]
    with pytest.raises(ParameterError, match="nothing to draw"):
        roofline.plot_roofline(found, tmp_path / "x.png")


@needs_matplotlib
def test_a_picture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for name in ("x.png", "x.SVG"):
        report.check_picture(tmp_path / name)
    ending = "the name must end in one of .*png"
    for name, message in (("no/x.png", "there is no folder"), ("x.xyz", ending), ("x", ending)):
        with pytest.raises(ParameterError, match=message):
            report.check_picture(tmp_path / name)
