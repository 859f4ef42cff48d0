"""What the parts of layers of experts change: how they are chosen, their weights, and what runs beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tools.goldens.case import Config
from tools.goldens.model import routers

__all__ = ["expert_removals"]

Mutate = Callable[[Any], None]
# The field of a config that says how many experts a token has, by the names that families have for it.
_CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts")


def keep(model: Any) -> None:
    """Leave the model as it is: the config is what changes."""


def other_experts(model: Any) -> None:
    """Each expert's logit goes to the next expert."""
    for router in routers(model):
        for name, parameter in router.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.data = parameter.data.roll(1, 0)


def expert_removals(model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides), for models with experts."""
    cfg = model.config
    chosen = next((name for name in _CHOSEN if name in cfg.to_dict() and cfg.to_dict()[name]), None)
    if chosen is None or not routers(model):
        return
    yield "other_experts", other_experts, {}
    yield "one_expert_less", keep, {chosen: getattr(cfg, chosen) - 1}
    if (renormalised := getattr(cfg, "norm_topk_prob", None)) is not None:
        yield "norm_topk_prob", keep, {"norm_topk_prob": not renormalised}
