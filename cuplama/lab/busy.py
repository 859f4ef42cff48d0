"""How busy other processes keep the machine while something is measured: what they use, a measurement loses."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Others", "remark"]

_STAT = Path("/proc/stat")
_WORTH_SAYING = 0.1  # cores: less is the noise of an idle system, and of a clock that ticks a hundred times a second


class Others:
    """Counts from its making on the CPU time that other processes use, as Linux tells it."""

    def __init__(self) -> None:
        self._busy, self._own, self._began = _busy_seconds(), time.process_time(), time.perf_counter()

    def cores(self) -> float | None:
        """Cores that other processes have used on average; None where the system does not say."""
        busy, taken = _busy_seconds(), time.perf_counter() - self._began
        if busy is None or self._busy is None or taken <= 0:
            return None
        return max(0.0, (busy - self._busy - (time.process_time() - self._own)) / taken)


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the system started: user, nice, system, interrupts and stolen time."""
    try:
        fields = _STAT.read_text().splitlines()[0].split()[1:9]
        user, nice, system, _idle, _iowait, *rest = map(int, fields)
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def remark(cores: float | None) -> str | None:
    """A line for people about what other processes used, if it is worth saying."""
    if cores is None or cores < _WORTH_SAYING:
        return None
    return f"the machine was busy: other processes used {cores:.1f} of {os.cpu_count()} cores meanwhile"
