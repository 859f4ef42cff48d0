"""How long PyTorch takes for the same on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["torch_seconds"]


def torch_seconds(torch: Any, run: Callable[[], Any], repeats: int = 7) -> float:
    """The median of a run's GPU time, several in a row."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 5e3)
    return float(np.median(times[2:]))
