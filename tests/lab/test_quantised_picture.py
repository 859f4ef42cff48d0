"""The picture of quantised formats, from results of bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quantised_picture import Point, draw, read_point
from cuplama.errors import ParameterError
from cuplama.lab import report
from tests.lab.common import PEAKS, inside, needs_matplotlib


def write(folder: Path, speed: float, gigabytes: float, options: str = "", device: str = "a GPU") -> Path:
    """What ``cuplama bench -o json`` writes of a prompt, and of one sequence and eight at two depths."""
    rows: list[dict[str, Any]] = [{"generated_tokens": 0, "batch": 1, "depth": 0}]
    for batch, depth in ((8, 0), (1, 4096), (1, 0)):
        rate = speed * gigabytes if (batch, depth) == (1, 0) else 1.0
        percent = PEAKS.percent_read(rate * 1e9)
        rows.append({"generated_tokens": 128, "batch": batch, "depth": depth, "tokens_per_second": speed,
                     "gigabytes_per_second": rate, "percent_of_read_bandwidth": percent})  # fmt: skip
    facts = {"model": "llama-3.1-8b", "device": device, "dtype": "bf16"}
    command = f"cuplama bench -m llama-3.1-8b --dummy-weights{options} -o json"
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"command": command, "environment": facts, "peaks": PEAKS.fields(), "rows": rows}))
    return path


def test_a_point_is_one_sequence_after_the_fewest_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, 600.0, 4.7, " --weight-format 'int4 g128'")
    point = read_point(str(path))
    assert (point.name, point.speed, point.read) == ("int4 g128", 600.0, 4000.0)
    assert point.gigabytes == pytest.approx(4.7)
    assert point.percent == pytest.approx(70.5)
    assert read_point(f"mine={path}").name == "mine"
    assert read_point(str(write(tmp_path, 450.0, 8.0, " --quantize=int8"))).name == "int8"
    assert read_point(str(write(tmp_path, 250.0, 15.0))).name == "bf16"


def test_files_without_a_point_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 600.0, 4.7)
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "rows": found["rows"][:2]}))
    for file in (path, tmp_path, tmp_path / "none.json"):
        with pytest.raises(ParameterError, match=f"^{file}: "):
            read_point(str(file))


@needs_matplotlib
def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    made = report.new_figure

    def new_figure(width: float, height: float) -> Any:
        figures.append(made(width, height))
        return figures[-1]

    monkeypatch.setattr(report, "new_figure", new_figure)
    points = [Point(f"format {i}", "m", "g", 4.0 + i, 3600 / (4.0 + i), 90.0, 4000.0) for i in range(12)]
    draw(points, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    (ax,) = figures[0].axes
    names = ax.get_legend().get_texts()
    assert [t.get_text() for t in names[:2]] == ["format 0  900, 90%", "format 1  720, 90%"]
    dots = ax.collections[: len(points)]
    assert len({(tuple(dot.get_facecolor()[0]), dot.get_paths()[0].vertices.tobytes()) for dot in dots}) == len(points)
    (line,) = ax.lines
    assert [x * y for x, y in zip(*line.get_data(), strict=True)] == pytest.approx([4000.0, 4000.0])
    inside(ax, [*names, *ax.texts])
    with pytest.raises(ParameterError, match="more than one device: g, other"):
        draw([points[0], Point("b", "m", "other", 1.0, 1.0, 1.0, 1.0)], tmp_path / "y.png")
