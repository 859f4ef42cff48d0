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


def softmax_weights(model: Any) -> None:
    """The chosen experts' weights in the ratios of a softmax, where sigmoids give them; their sum stays."""

    def keep_sum(module: Any, ins: Any, outs: tuple[Any, ...]) -> tuple[Any, ...]:
        logits, weights, chosen = outs
        others = logits.float().softmax(-1).gather(-1, chosen)
        return logits, others * (weights.sum(-1, keepdim=True) / others.sum(-1, keepdim=True)), chosen

    for router in routers(model):
        router.register_forward_hook(keep_sum)


def tensors(model: Any) -> list[tuple[str, Any]]:
    """(name, tensor) of parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]


def zeroed(match: str) -> Mutate:
    """Zero the tensors whose name contains the text."""

    def mutate(model: Any) -> None:
        for name, tensor in tensors(model):
            if match in name:
                tensor.data.zero_()

    return mutate


def filled_with_one(match: str) -> Mutate:
    """Set the parameters whose name contains the text to one."""

    def mutate(model: Any) -> None:
        for name, tensor in tensors(model):
            if match in name:
                tensor.data.fill_(1.0)

    return mutate


def no_sinks(model: Any) -> None:
    """Attention that leaves nothing over."""
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)


def rows_in_halves(model: Any) -> None:
    """Gates in the first half of each expert's columns, and not in every second."""
    for layer in model.model.layers:
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            parameter = getattr(layer.mlp.experts, name)
            parameter.data = parameter.data.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def gpt_oss_removals() -> Iterator[tuple[str, Mutate, Config]]:
    """The same of what gpt-oss has beside experts."""
    yield "sinks", no_sinks, {}
    yield "interleaved", rows_in_halves, {}
    yield "swiglu_limit", keep, {"swiglu_limit": 100.0}
    yield "swiglu_alpha", keep, {"swiglu_alpha": 1.0}
    for part in ("router.bias", "gate_up_proj_bias", "down_proj_bias"):
        yield part, zeroed(part), {}


def expert_removals(model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides), for models with experts."""
    cfg = model.config
    chosen = next((name for name in _CHOSEN if name in cfg.to_dict() and cfg.to_dict()[name]), None)
    if chosen is None or not routers(model):
        return
    if cfg.model_type == "gpt_oss":
        yield from gpt_oss_removals()
    yield "other_experts", other_experts, {}
    if cfg.model_type != "phimoe":  # its mixer always chooses two
        yield "one_expert_less", keep, {chosen: getattr(cfg, chosen) - 1}
    settings = cfg.to_dict()
    if settings.get("n_group", 1) > 1:
        yield "groups", keep, {"n_group": 1, "topk_group": 1}
        yield "one_group_less", keep, {"topk_group": cfg.topk_group - 1}
    if "routed_scaling_factor" in settings:
        yield "routed_scaling_factor", keep, {"routed_scaling_factor": 1.0}
    if cfg.model_type in ("dots1", "minimax_m2"):
        yield "sigmoids", softmax_weights, {}
    if "router_jitter_noise" in settings and cfg.model_type == "phimoe":
        yield "mixer_threshold", keep, {"router_jitter_noise": 0.01}
    if any("e_score_correction_bias" in name for name, _ in tensors(model)):
        yield "correction", zeroed("e_score_correction_bias"), {}
    for part in ("router.scale", "per_expert_scale", "layernorm_1.weight", "layernorm_2.weight"):
        if any(part in name for name, _ in tensors(model)):
            yield part, filled_with_one(part), {}
    for part in ("shared_expert.", "shared_experts.", "shared_expert_gate"):
        if any(part in name for name, _ in tensors(model)):
            yield part.rstrip("."), zeroed(part), {}
    if (renormalised := getattr(cfg, "norm_topk_prob", None)) is not None:
        yield "norm_topk_prob", keep, {"norm_topk_prob": not renormalised}
