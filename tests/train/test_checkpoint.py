"""The folder of a training: what it accepts, saves and gives back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest

from cuplama.errors import CheckpointError
from cuplama.train.checkpoint import Run, TrainingFolder
from cuplama.train.saving import Staging
from cuplama.train.settings import TrainingSettings

ARRAYS: dict[str, np.ndarray[Any, Any]] = {"m": np.arange(4, dtype=np.float32), "done": np.array([3], np.int64)}


def run(data: str = "d", model: str = "m", context: int = 8, **settings: Any) -> Run:
    return Run(TrainingSettings(**{"steps": 10, **settings}), data, model, context)


def model(staging: Staging) -> None:
    staging.text("config.json", "{}")


def saved(folder: Path, step: int = 3) -> TrainingFolder:
    found = TrainingFolder(folder, resume=True)
    found.save(step, ARRAYS, run(), model)
    return found


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    assert TrainingFolder(tmp_path / "out", resume=False).load(run()) is None
    found = saved(tmp_path / "out").load(run(steps=20))
    assert found is not None
    assert found.step == 3
    assert {name: array.tolist() for name, array in found.arrays.items()} == {"m": [0, 1, 2, 3], "done": [3]}
    assert found.run["settings"]["steps"] == 10
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_folders_that_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out has a checkpoint; --resume goes on from it"):
        TrainingFolder(tmp_path / "out", resume=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="home is not empty, and nothing was trained there"):
            TrainingFolder(tmp_path / "home", resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: Not a directory"):
        TrainingFolder(tmp_path / "file", resume=False)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    """Another would clear away what this one is writing. A process that is dead, however it died, holds nothing."""
    pytest.importorskip("fcntl")
    folder = tmp_path / "out"
    code = (
        "import sys, pathlib; from cuplama.train.checkpoint import TrainingFolder;"
        f"folder = TrainingFolder(pathlib.Path({str(folder)!r}), False); print('there', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        unfinished = folder / "model.safetensors.unfinished"
        unfinished.write_text("")
        with pytest.raises(CheckpointError, match="training is in use: another process trains there"):
            TrainingFolder(folder, resume=True)
        assert unfinished.exists()
        other.kill()
    with TrainingFolder(folder, resume=True):
        assert not unfinished.exists()
    TrainingFolder(folder, resume=True).close()


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path / "out", resume=False).path
    (folder / "model.safetensors.unfinished").write_text("")
    (folder / "training" / "state.safetensors.unfinished").write_text("")
    TrainingFolder(folder, resume=False)  # nothing was saved: it begins again, without --resume, too
    assert [p.name for p in folder.rglob("*")] == ["training"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"lr": 0.5, "seed": 3}, r"was trained with lr = 0\.0003, not 0\.5, seed = 0, not 3; --resume needs the same"),
        ({"context": 16}, r"was trained with context = 8, not 16;"),
        ({"data": "e"}, "was trained from other data;"),
        ({"model": "n"}, "was trained from another model, or an older version of it;"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    folder = saved(tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        folder.load(run(**other))


def test_the_rows_length_may_be_given_or_not(tmp_path: Path) -> None:
    given = Run(TrainingSettings(10, context=8), "d", "m", 8)
    assert saved(tmp_path / "out").load(given) is not None


def test_damaged_checkpoints(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    state = tmp_path / "out" / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is truncated or corrupt"):
        folder.load(run())
    staging = Staging(tmp_path / "out")
    staging.tensors("training/state.safetensors", ARRAYS)
    staging.written[0][0].replace(staging.written[0][1])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is not the checkpoint of a training"):
        folder.load(run())


def test_a_run_that_is_killed_between_two_files_has_no_step_that_the_model_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else going on would find all steps done, and leave the model of the save before."""
    folder, moved, replace = saved(tmp_path / "out"), list[str](), Path.replace

    class Killed(BaseException):
        pass

    def killed(self: Path, target: Path) -> None:
        if moved:
            raise Killed
        moved.append(target.name)
        replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        folder.save(4, ARRAYS, run(), lambda staging: staging.text("config.json", "newer"))
    assert moved == ["config.json"]
    found = folder.load(run())
    assert found is not None
    assert found.step == 3


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "out")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="out: No space left on device; the checkpoint of step 3 is whole, and"):
        folder.save(4, ARRAYS, run(), model)
    found = folder.load(run())
    assert found is not None
    assert found.step == 3
    fresh = TrainingFolder(tmp_path / "fresh", resume=False)
    with pytest.raises(CheckpointError, match="No space left on device; nothing is saved yet"):
        fresh.save(4, ARRAYS, run(), model)
