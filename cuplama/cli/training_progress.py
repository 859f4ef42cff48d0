"""What ``cuplama train`` shows while it runs, and how a signal ends it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from .streams import is_quiet, notice, say_progress

if TYPE_CHECKING:
    from ..train.loop import Report

__all__ = ["Stopping", "TrainingProgress", "stopping_signals"]

_SECONDS = 10.0  # between two lines where stderr is no terminal


class TrainingProgress:
    """A bar on a terminal; elsewhere a line every few seconds. Evaluations have a line of their own in both."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._said = 0.0

    @contextmanager
    def shown(self) -> Iterator[TrainingProgress]:
        """While the block runs. The bar goes with it."""
        if sys.stderr.isatty() and not is_quiet():
            self._bar = _bar()
        try:
            yield self
        finally:
            if self._bar is not None and self._bar.live.is_started:
                self._bar.stop()

    def __call__(self, report: Report) -> None:
        """Show how far the training has come."""
        facts = f"loss {report.loss:.4f}", f"{report.tokens_per_second:,.0f} tokens/s"
        now, line = time.monotonic(), f"step {report.step} of {report.steps}: {', '.join(facts)}"
        if report.evaluated:
            self._line(f"{line}, evaluation {report.eval_loss:.4f}")
        elif self._bar is None and (now - self._said >= _SECONDS or report.step == report.steps):
            self._line(f"{line}, {duration(report.left)} left" if report.step < report.steps else line)
            self._said = now
        if self._bar is not None:
            self._update(report, "  ".join(facts))

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say_progress(text)

    def _update(self, report: Report, facts: str) -> None:
        shown = {"completed": report.step, "facts": facts, "left": f"{duration(report.left)} left"}
        if self._task is None:
            self._task = self._bar.add_task("training", total=report.steps, **shown)
            self._bar.start()
        self._bar.update(self._task, **shown)


def duration(seconds: float) -> str:
    """A time for people, to the second: "0:12:03"."""
    return str(timedelta(seconds=round(seconds)))


def _bar() -> Any:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("training"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("steps  {task.fields[facts]}  {task.fields[left]}"),
    )
    return rich.Progress(*columns, console=Console(stderr=True), transient=True)


class Stopping:
    """Lets Ctrl-C and SIGTERM end a training after the step that is running. A second one ends it at once."""

    def __init__(self) -> None:
        self.signal = 0
        """The number of the signal that came, 0 for none."""
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal != 0

    def listen(self) -> None:
        """From now on. A signal that is ignored, as in jobs that a shell runs behind, stays so."""
        if threading.current_thread() is threading.main_thread():
            numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            self._before |= {n: signal.signal(n, self._note) for n in numbers}

    def restore(self) -> None:
        """Have signals do again what they did."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        notice("stopping after this step, which is saved; once more stops at once, and loses what is not saved")


@contextmanager
def stopping_signals() -> Iterator[Stopping]:
    """A ``Stopping``, which listens no longer than the block runs."""
    stopping = Stopping()
    try:
        yield stopping
    finally:
        stopping.restore()
