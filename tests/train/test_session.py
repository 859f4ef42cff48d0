"""A trainer of a folder, in a loop of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cuplama
from cuplama.backends.numpy import NumPyBackend
from cuplama.errors import ParameterError
from cuplama.train import Batch, TrainingSettings, gradients, open_trainer


def test_a_model_learns_a_text_and_is_saved(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (2, 9))
    batch = Batch.of_rows(ids)
    trainer = open_trainer(None, TrainingSettings(5, device="numpy"))
    with cuplama.load(device="numpy") as model:
        before = gradients(model, ids)[0]
    losses = [trainer.step([batch], 1e-3).loss for _ in range(5)]
    assert losses[0] == pytest.approx(before, rel=1e-6)
    trainer.save(tmp_path / "out")
    after = trainer.evaluate([batch])
    trainer.close()
    assert after < losses[0] - 1
    with cuplama.load(tmp_path / "out", device="numpy") as model:
        assert gradients(model, ids)[0] == pytest.approx(after, rel=1e-6)


def test_a_trainer_of_arrays_has_no_files(tmp_path: Path) -> None:
    trainer = open_trainer(None, TrainingSettings(1, device="numpy"))
    trainer.files = None
    with pytest.raises(ParameterError, match=r"export\(\) has its tensors"):
        trainer.save(tmp_path)


def test_a_trainer_closes_the_backend_that_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[NumPyBackend] = []
    monkeypatch.setattr(NumPyBackend, "close", lambda self: closed.append(self))
    with open_trainer(None, TrainingSettings(1, device="numpy")) as trainer:
        assert closed == []
    assert len(closed) == 1
    trainer.close()
    assert len(closed) == 1
