"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from cuplama.models.checkpoint import open_tensors
from cuplama.train.saving import saved_together


def test_tensors_as_others_read_them(tmp_path: Path) -> None:
    arrays = {
        "odd": np.arange(3, dtype=ml_dtypes.bfloat16),
        "wide": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "one": np.array([7], np.int64),
    }
    with saved_together(tmp_path) as staging:
        staging.tensors("model.safetensors", arrays, {"step": "3"})
        assert not (tmp_path / "model.safetensors").exists()
    found = open_tensors(tmp_path)
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(found[name].data), array)
    with safe_open(str(tmp_path / "model.safetensors"), framework="np") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}


def test_all_files_take_their_places_together(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with saved_together(tmp_path) as staging:
        staging.text("a.json", "new ü")
        staging.copy(tmp_path / "a.json", "deep/b.json")
        assert (tmp_path / "a.json").read_text() == "old"
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "new ü"
    assert (tmp_path / "deep" / "b.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "b.json", "deep"]


def write_three(folder: Path) -> None:
    with saved_together(folder) as staging:
        for name in ("a", "b", "c"):
            staging.text(name, "new")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    calls, sync = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_three(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys("abc", "old")
