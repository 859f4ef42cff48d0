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
from tests.lab.common import PEAKS, inside, needs_matplotlib


def _made_up(model: str = "llama-3.2-1b") -> dict[str, Any]:
    config = find_shape(model)[1]
    rows = []
    for case in decode_workloads(config, "bf16") + prompt_workloads(config, "bf16"):
        floor = max(case.call.nbytes() / PEAKS.read, case.call.flops() / PEAKS.arithmetic)
        rows.append(kernel_bench.row(case, Spread((floor / 0.8,)), None, PEAKS))
    facts = {"model": model, "device": "a GPU", "dtype": "bf16", "date": "2026-11-20"}
    return {"environment": facts, "peaks": PEAKS.fields(), "rows": rows}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are made."""
    kept: list[Any] = []
    made = report.new_figure

    def new_figure(width: float, height: float) -> Any:
        kept.append(made(width, height))
        return kept[-1]

    monkeypatch.setattr(report, "new_figure", new_figure)
    return kept


@needs_matplotlib
@pytest.mark.parametrize("model", ["llama-3.2-1b", "gpt2", "qwen3-8b"])
def test_roofline(model: str, tmp_path: Path, figures: list[Any]) -> None:
    found = _made_up(model)
    roofline.plot_roofline(found, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    (ax,) = figures[0].axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    names = [t for t in ax.texts if re.search(r"\d%$", t.get_text())]
    computing = {(r["graph"], r["op"], r["weights"]) for r in found["rows"] if r["operations"]}
    assert len(names) == len(computing)
    wanted = {"linear_add (down_proj) 80%", "attention 80%", "append_attention 80%"}
    if model == "llama-3.2-1b":
        assert {t.get_text().strip() for t in names} >= wanted
    boxes = [t.get_window_extent() for t in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "labels cover each other"
    inside(ax, ax.texts)
    legend = ax.get_legend().get_window_extent()
    assert not any(legend.overlaps(box) for box in boxes), "the legend covers a label"
    looks = [(tuple(p.get_facecolors()[0]), p.get_paths()[0].vertices.tobytes()) for p in ax.collections[1:]]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks) == 2


@needs_matplotlib
def test_a_label_at_the_right_edge_stays_inside(tmp_path: Path, figures: list[Any]) -> None:
    found = _made_up()
    long = [dict(r, weights="a_weight_of_a_rather_long_name/" * 4) for r in found["rows"] if r["op"] == "linear"]
    roofline.plot_roofline({**found, "rows": long}, tmp_path / "roof.png")
    inside(figures[0].axes[0], figures[0].axes[0].texts)


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
