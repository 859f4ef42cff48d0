"""The loop of a training: step after step, with evaluations, saves, a log, and an end that leaves all in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import DeviceError
from .batch import Batch
from .log import TrainingLog
from .settings import TrainingSettings

__all__ = ["Loop", "Outcome", "Report", "StepResult", "Steps"]

_SMOOTH = 0.1  # weight of the newest step in the time that a step is expected to take


class StepResult(Protocol):
    """What a step gave. Reading a number may wait for the device."""

    @property
    def loss(self) -> float:
        """Mean loss of the learned tokens, by the weights before the step."""

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients together, before it was limited."""


class Steps(Protocol):
    """What the loop needs of a trainer."""

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One update of the weights, which may still be going on when this returns."""

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The sum of the losses of batches."""


@dataclass(frozen=True)
class Report:
    """How far a training has come. left: seconds that the rest will take; evaluated: whether ``eval_loss``, the last
    that was measured, is of this step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    left: float
    eval_loss: float | None
    evaluated: bool


@dataclass(frozen=True)
class Outcome:
    """How a loop ended. step: the last one; stopped: whether it was asked to stop before all steps were done."""

    step: int
    stopped: bool


@dataclass
class Loop:
    """A training.

    batches: step, from 1 on -> its batches; evaluation: the batches of all that is evaluated on, or None; save: called
    with a step after which all is to be saved; report: called after every step; stop: whether to end after this step.
    """

    trainer: Steps
    settings: TrainingSettings
    batches: Callable[[int], Sequence[Batch]]
    evaluation: Callable[[], Iterable[Batch]] | None
    log: TrainingLog
    save: Callable[[int], None]
    report: Callable[[Report], None]
    stop: Callable[[], bool]

    def run(self, done: int) -> Outcome:
        """All steps that are left after ``done`` of them.

        While the device computes a step, the host makes the batches of the next one. Raises DeviceError that names the
        step whose loss or gradient is not finite: nothing is saved then, and the checkpoint before stays.
        """
        self._saved, self._seconds = done, 0.0
        self._eval_loss: float | None = None
        self._clock = time.perf_counter()
        steps = self.settings.steps
        batches = self.batches(done + 1) if done < steps else []
        for step in range(done + 1, steps + 1):
            lr = self.settings.learning_rate(step)
            queued = _Queued(step, lr, batches, self.trainer.step(batches, lr))
            last = step == steps or self.stop()
            batches = [] if last else self.batches(step + 1)
            evaluate = self._due(step, self.settings.eval_every, step == steps)
            self._finish(queued, self.evaluation if evaluate else None)
            if self._due(step, self.settings.save_every, last):
                self.log.sync()
                self.save(step)
                self._saved = step
            self._clock = time.perf_counter()
            if last:
                return Outcome(step, step < steps)
        return Outcome(done, False)

    def _due(self, step: int, every: int, end: bool) -> bool:
        return end or (every > 0 and step % every == 0)

    def _finish(self, queued: _Queued, evaluation: Callable[[], Iterable[Batch]] | None) -> None:
        """Read what a step gave, and log it."""
        step, settings = queued.step, self.settings
        loss, norm = float(queued.result.loss), float(queued.result.grad_norm)
        now = time.perf_counter()
        seconds = max(now - self._clock, 1e-9)
        self._check(step, "the loss", loss)
        self._check(step, "the norm of the gradients", norm)
        self._seconds += (seconds - self._seconds) * (_SMOOTH if self._seconds else 1)
        rate = sum(b.rows for b in queued.batches) / seconds
        row = {
            "step": step,
            "loss": loss,
            "lr": queued.lr,
            "grad_norm": norm,
            "tokens_per_second": round(rate, 1),
            "positions": sum(int(np.count_nonzero(b.weights)) for b in queued.batches),
        }
        if evaluation is not None:
            row["eval_loss"] = self._eval_loss = measured = float(self.trainer.evaluate(evaluation()))
            self._check(step, "the loss of the evaluation", measured)
        self.log.add(row)
        left = self._seconds * (settings.steps - step)
        self.report(Report(step, settings.steps, loss, rate, left, self._eval_loss, evaluation is not None))

    def _check(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"the checkpoint of step {self._saved} stays" if self._saved else "nothing was saved"
            raise DeviceError(f"step {step}: {name} is {value}; {kept} (a smaller --lr or a --warmup may help)")


@dataclass(frozen=True)
class _Queued:
    """A step whose numbers were not read yet."""

    step: int
    lr: float
    batches: Sequence[Batch]
    result: StepResult
