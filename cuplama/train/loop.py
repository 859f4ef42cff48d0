"""The loop of a training: step after step, with evaluations, saves, a log, and an end that leaves all in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    """How far a training has come. left: seconds that the rest will take; eval_loss: the last that was measured."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    left: float
    eval_loss: float | None


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

        The numbers of a step are read when the next one is queued, so that the device never waits for the host. Raises
        DeviceError that names the step whose loss or gradient is not finite: nothing is saved then, and the checkpoint
        before stays.
        """
        self._saved, self._seconds = done, 0.0
        self._eval_loss: float | None = None
        self._clock = time.perf_counter()
        pending: _Pending | None = None
        steps = self.settings.steps
        for step in range(done + 1, steps + 1):
            batches, lr = self.batches(step), self.settings.learning_rate(step)
            result = self.trainer.step(batches, lr)
            if pending is not None:
                self._finish(pending)
            pending = _Pending(step, lr, batches, result)
            last = step == steps or self.stop()
            evaluate = self.evaluation is not None and self._due(step, self.settings.eval_every, step == steps)
            save = self._due(step, self.settings.save_every, last)
            if evaluate or save:
                self._finish(pending, evaluate)
                pending = None
                if save:
                    self._save(step)
                self._clock = time.perf_counter()
            if last:
                return Outcome(step, step < steps)
        return Outcome(done, False)

    def _due(self, step: int, every: int, end: bool) -> bool:
        return end or (every > 0 and step % every == 0)

    def _finish(self, pending: _Pending, evaluate: bool = False) -> None:
        """Read what a step gave, and log it."""
        step, settings = pending.step, self.settings
        loss, norm = float(pending.result.loss), float(pending.result.grad_norm)
        now = time.perf_counter()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        self._check(step, "the loss", loss)
        self._check(step, "the norm of the gradients", norm)
        self._seconds += (seconds - self._seconds) * (_SMOOTH if self._seconds else 1)
        rate = sum(b.rows for b in pending.batches) / seconds
        row = {
            "step": step,
            "loss": loss,
            "lr": pending.lr,
            "grad_norm": norm,
            "tokens_per_second": round(rate, 1),
            "positions": sum(int(np.count_nonzero(b.weights)) for b in pending.batches),
        }
        if evaluate and self.evaluation is not None:
            row["eval_loss"] = self._eval_loss = measured = float(self.trainer.evaluate(self.evaluation()))
            self._check(step, "the loss of the evaluation", measured)
        self.log.add(row)
        left = self._seconds * (settings.steps - step)
        self.report(Report(step, settings.steps, loss, rate, left, self._eval_loss))

    def _check(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"the checkpoint of step {self._saved} stays" if self._saved else "nothing was saved"
            raise DeviceError(f"step {step}: {name} is {value}; {kept} (a smaller --lr or a --warmup may help)")

    def _save(self, step: int) -> None:
        self.log.sync()
        self.save(step)
        self._saved = step


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers were not read yet."""

    step: int
    lr: float
    batches: Sequence[Batch]
    result: Any
