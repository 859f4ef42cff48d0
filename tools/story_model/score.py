"""How well a model predicts texts, and the device that it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tools.story_model.data import Ids, windows

__all__ = ["autocast", "device_of", "nats"]


def device_of() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products on a GPU; nothing on a CPU."""
    context: contextlib.AbstractContextManager[Any] = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda"
    )
    return context


@torch.no_grad()  # type: ignore[untyped-decorator]
def nats(logits_of: Callable[[Tensor], Tensor], texts: Sequence[Ids], context: int, device: torch.device) -> float:
    """Sum of -ln p of every token but the first of each text, in windows of at most `context` tokens."""
    spans = [(t[b:e], s - b) for t in texts for b, e, s in windows(len(t), context, context // 2)]
    spans.sort(key=lambda s: len(s[0]))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(0, len(spans), 32):
        group = spans[i : i + 32]
        ids = np.zeros((len(group), max(len(s) for s, _ in group)), np.int64)
        wanted = np.full_like(ids, -100)
        for row, want, (span, first) in zip(ids, wanted, group, strict=True):
            row[: len(span)] = span
            want[first - 1 : len(span) - 1] = span[first:]
        logits = logits_of(torch.from_numpy(ids).to(device)).float()
        goal = torch.from_numpy(wanted).to(device)
        total += F.cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=-100, reduction="sum").double()
    return float(total)
