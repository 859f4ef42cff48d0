"""The loop over the steps, with a trainer that only counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.errors import DeviceError
from cuplama.train.batch import Batch
from cuplama.train.log import TrainingLog, read_log
from cuplama.train.loop import Loop, Outcome, Report
from cuplama.train.settings import TrainingSettings


class Counting:
    """A trainer whose numbers are the step's. bad: step -> what it gives instead."""

    def __init__(self, bad: dict[int, tuple[float, float]] | None = None, eval_loss: float = 1.5) -> None:
        self.done, self.bad, self.eval_loss = 0, bad or {}, eval_loss
        self.lrs: list[float] = []
        self.did: list[str] = []

    def step(self, batches: Sequence[Batch], lr: float) -> Any:
        self.done += 1
        self.lrs.append(lr)
        self.did.append(f"step {self.done}")
        loss, norm = self.bad.get(self.done, (1.0 / self.done, 2.0))
        return SimpleNamespace(loss=loss, grad_norm=norm)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        self.did.append(f"evaluate {len(list(batches))}")
        return self.eval_loss


def batch() -> Batch:
    found = Batch.of_rows(np.arange(10).reshape(2, 5))
    found.weights[0] = 0
    return found


def loop(folder: Path, trainer: Counting, stop_after: int = 0, done: int = 0, **settings: Any) -> Loop:
    trainer.done = done
    chosen = TrainingSettings(**{"steps": 10, "eval_every": 0, "save_every": 0, **settings})
    return Loop(
        trainer=trainer,
        settings=chosen,
        batches=lambda step: [batch()] * chosen.accumulate,
        evaluation=lambda: iter([batch()] * 3),
        log=TrainingLog(folder, done),
        save=lambda step: trainer.did.append(f"save {step}"),
        report=lambda report: None,
        stop=lambda: 0 < stop_after <= trainer.done,
    )


def test_steps_evaluations_and_saves_in_order(tmp_path: Path) -> None:
    trainer = Counting()
    assert loop(tmp_path, trainer, steps=5, eval_every=2, save_every=3).run(0) == Outcome(5, False)
    said = "step 1, step 2, evaluate 3, step 3, save 3, step 4, evaluate 3, step 5, evaluate 3, save 5"
    assert ", ".join(trainer.did) == said


def test_what_a_row_says(tmp_path: Path) -> None:
    trainer = Counting()
    loop(tmp_path, trainer, steps=4, eval_every=2, accumulate=2, lr=0.5, schedule="constant", warmup=2).run(0)
    rows = list(read_log(tmp_path / "log.jsonl"))
    names = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "positions"}
    assert [row.keys() - names for row in rows] == [set(), {"eval_loss"}, set(), {"eval_loss"}]
    assert all(row.pop("tokens_per_second") > 0 for row in rows)
    assert rows[1] == {"step": 2, "loss": 0.5, "lr": 0.5, "grad_norm": 2.0, "positions": 14, "eval_loss": 1.5}
    assert trainer.lrs == [0.25, 0.5, 0.5, 0.5]


def test_a_stop_finishes_the_step_and_saves(tmp_path: Path) -> None:
    trainer = Counting()
    assert loop(tmp_path, trainer, stop_after=2, eval_every=5).run(0) == Outcome(2, True)
    assert trainer.did == ["step 1", "step 2", "save 2"]
    assert len(list(read_log(tmp_path / "log.jsonl"))) == 2
    late = Counting()
    assert loop(tmp_path, late, stop_after=10).run(0) == Outcome(10, False)


def test_going_on(tmp_path: Path) -> None:
    trainer = Counting()
    assert loop(tmp_path, trainer, done=8, save_every=4).run(8) == Outcome(10, False)
    assert trainer.did == ["step 9", "step 10", "evaluate 3", "save 10"]
    assert loop(tmp_path, trainer, done=10).run(10) == Outcome(10, False)


@pytest.mark.parametrize(
    ("bad", "said"),
    [((float("nan"), 1.0), "the loss is nan"), ((1.0, float("inf")), "the norm of the gradients is inf")],
)
def test_what_is_not_finite_stops_and_saves_nothing(tmp_path: Path, bad: tuple[float, float], said: str) -> None:
    trainer = Counting({6: bad})
    with pytest.raises(DeviceError, match=f"step 6: {said}; the checkpoint of step 4 stays"):
        loop(tmp_path, trainer, save_every=2).run(0)
    assert trainer.did[-2:] == ["step 5", "step 6"]
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]
    with pytest.raises(DeviceError, match="nothing was saved"):
        loop(tmp_path, Counting({6: bad})).run(0)
    with pytest.raises(DeviceError, match="step 10: the loss of the evaluation is nan"):
        loop(tmp_path, Counting(eval_loss=float("nan"))).run(0)


def test_reports_come_with_the_time_left(tmp_path: Path) -> None:
    found: list[Report] = []
    made = loop(tmp_path, Counting(), steps=4, eval_every=3)
    made.report = found.append
    made.run(0)
    assert [(r.step, r.eval_loss, r.evaluated) for r in found] == [
        (1, None, False), (2, None, False), (3, 1.5, True), (4, 1.5, True),
    ]  # fmt: skip
    assert found[0].left > 0
    assert found[-1].left == 0
