"""Muon and AdamW under one schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tools.story_model.model import Story
from tools.story_model.runs import Run

__all__ = ["Muon", "Optimizer", "orthogonalize", "schedule"]


def orthogonalize(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of g [n, rows, cols], roughly: Newton-Schulz steps of Muon, in bf16."""
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalised per matrix (Jordan et al. 2024), with decoupled weight decay."""

    def __init__(self, params: Sequence[nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        shapes = dict.fromkeys(p.shape for p in params)
        self.groups = [[p for p in params if p.shape == shape] for shape in shapes]
        self.moments = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, lr: float) -> None:
        for group, moment in zip(self.groups, self.moments, strict=True):
            grad = torch.stack([p.grad for p in group])
            moment.lerp_(grad, 1 - self.momentum)
            update = orthogonalize(grad.lerp(moment, self.momentum))
            rows, cols = update.shape[-2:]
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * math.sqrt(max(1.0, rows / cols)))


class Optimizer:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all; one schedule scales both."""

    def __init__(self, model: Story, run: Run) -> None:
        self.run = run
        hidden = [p for p in model.layers.parameters() if p.ndim == 2] if run.optimizer == "muon" else []
        taken = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in taken]
        self.muon = Muon(hidden, run.weight_decay)
        groups = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": run.weight_decay},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=run.adam_lr, betas=(0.9, 0.98), fused=rest[0].is_cuda)

    def step(self, scale: float) -> None:
        self.muon.step(self.run.lr * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.run.adam_lr * scale
        self.adam.step()
        for p in [*(p for g in self.muon.groups for p in g), *(q for h in self.adam.param_groups for q in h["params"])]:
            p.grad = None


def schedule(progress: float) -> float:
    """Warm-up over 2 %, constant to 30 %, then linear to zero."""
    return max(0.0, min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / 0.7))
