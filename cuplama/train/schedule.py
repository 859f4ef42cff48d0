"""How the learning rate goes over the steps of a run: it rises evenly, and then falls, or stays."""

from __future__ import annotations

import math

__all__ = ["FLOOR", "SCHEDULES", "learning_rate"]

SCHEDULES = ("cosine", "linear", "constant")
FLOOR = 0.1
"""The share of the highest learning rate that the last step has, a tenth as in Hoffmann et al., arXiv:2203.15556."""


def learning_rate(step: int, steps: int, lr: float, warmup: int, schedule: str) -> float:
    """The learning rate of a step, counted from 1.

    Step k of the warm-up has lr k / warmup, so that its last one has lr. After it ``cosine`` (Loshchilov and Hutter,
    arXiv:1608.03983) and ``linear`` fall to FLOOR lr at the last step; ``constant`` stays.
    """
    if step <= warmup:
        return lr * step / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return lr * (FLOOR + (1.0 - FLOOR) * left)
