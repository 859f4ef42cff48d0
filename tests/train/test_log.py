"""log.jsonl and loss.png."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import CheckpointError
from cuplama.train.log import TrainingLog, read_log
from cuplama.train.picture import draw_losses


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 - step / 1000, "lr": 0.1, **more}


def write(folder: Path, steps: range, after: int = 0) -> None:
    log = TrainingLog(folder, after)
    for step in steps:
        log.add(row(step))
    log.sync()
    log.close()


def test_rows_are_there_at_once(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.add(row(1, eval_loss=2.5))
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [row(1, eval_loss=2.5)]
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.add({"step": 2, "loss": float("nan")})
    log.close()


def test_rows_behind_the_checkpoint_are_cut(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the machine stopped here
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 8))
    write(tmp_path, range(6, 8), after=5)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    write(tmp_path, range(1, 2))
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1]


def test_a_full_disk_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainingLog(tmp_path, 0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"log\.jsonl: No space left on device; the last checkpoint is whole"):
        log.sync()
    log.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is a disk without room")
def test_a_row_without_room_is_told_once(tmp_path: Path) -> None:
    """Closing the file tries to write it once more."""
    log = TrainingLog(tmp_path, 0)
    log.close()
    with Path("/dev/full").open("a") as full:
        log._file = full
        with pytest.raises(CheckpointError, match=r"log\.jsonl: No space left on device; the last checkpoint is whole"):
            log.add(row(1))
        log.close()


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, range(1, 2))
    assert draw_losses(tmp_path) is None
    small = (tmp_path / "loss.png").stat().st_size
    log = TrainingLog(tmp_path, 0)
    for step in range(1, 1500):
        log.add(row(step, **({"eval_loss": 3.0} if step % 500 == 0 else {})))
    log.close()
    assert draw_losses(tmp_path) is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.png").stat().st_size != small


def test_without_matplotlib_or_room_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 3))
    if "matplotlib" in sys.modules or pytest.importorskip("matplotlib"):
        (tmp_path / "loss.png.unfinished").mkdir()
        said = draw_losses(tmp_path)
        assert said is not None
        assert said.startswith("loss.png was not drawn: ")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_losses(tmp_path) == "loss.png is not drawn without matplotlib; pip install 'cuplama[plot]'"
