"""What the parts change that only some families have: order of blocks and norms, pairs, scales, activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tools.goldens.case import Config

__all__ = ["more_removals"]

Mutate = Callable[[Any], None]


def in_sequence(model: Any) -> None:
    """The MLP behind attention, where a layer runs both side by side."""

    def run(layer: Any, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        x = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **rest)[0]
        return x + layer.mlp(layer.input_layernorm(x))

    for layer in model.model.layers:
        layer.forward = lambda hidden_states, layer=layer, **rest: run(layer, hidden_states, **rest)


def rotated_everywhere(model: Any) -> None:
    """Rotation also in the layers that have none."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.is_sliding, attention.sliding_window = True, model.config.sliding_window


def other_pairs(model: Any) -> None:
    """Halves in place of neighbours: the rows of q and k are permuted, which changes nothing but what rotates them."""
    for layer in model.model.layers:
        d, n = layer.self_attn.head_dim, 2 * len(model.model.rotary_emb.inv_freq)
        order = torch.tensor([*range(0, n, 2), *range(1, n, 2), *range(n, d)])
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for parameter in module.parameters():
                parameter.data = parameter.data.unflatten(0, (-1, d))[:, order].flatten(0, 1)


def norms_before_rotation(model: Any) -> None:
    """Queries and keys normalised before they are rotated, where it is done behind."""

    def through(module: Any, norm: Any, d: int) -> Callable[[torch.Tensor], torch.Tensor]:
        forward = module.forward
        return lambda x: norm(forward(x).unflatten(-1, (-1, d))).flatten(-2)

    for layer in model.model.layers:
        attention = layer.self_attn
        for proj, name in ((attention.q_proj, "query_layernorm"), (attention.k_proj, "key_layernorm")):
            proj.forward = through(proj, getattr(attention, name), attention.head_dim)
            setattr(attention, name, nn.Identity())


def norm_offset(model: Any) -> None:
    """Norm weights as they are, where the model adds one to them."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data -= 1


def other_activation(other: nn.Module) -> Mutate:
    """Another activation in every MLP."""

    def mutate(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn = layer.mlp.activation_fn = layer.mlp.act = other

    return mutate


def unscaled_logits(model: Any) -> None:
    """Logits as the head gives them."""
    model.logit_scale = 1.0


def keep(model: Any) -> None:
    """Change the config alone."""


_PAIRED = ("cohere2", "ernie4_5", "glm", "glm4", "helium")
_PARALLEL = ("cohere2", "phi")
_ACTIVATIONS = {
    "relu2": ("relu_not_squared", nn.ReLU()),
    "gelu_new": ("other_gelu", nn.GELU()),
    "gelu_pytorch_tanh": ("other_gelu", nn.GELU()),
}


def more_removals(model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides) of what the model has beside Llama's parts."""
    cfg = model.config
    family, settings, types = cfg.model_type, cfg.rope_parameters, getattr(cfg, "layer_types", None) or []
    if family in _PARALLEL:
        yield "parallel", in_sequence, {}
    if family in _PAIRED:
        yield "neighbours", other_pairs, {}
    if family in ("cohere2", "exaone4") and len(set(types)) == 2:
        yield "no_rotation_in_full_layers", rotated_everywhere, {}
    if family == "hunyuan_v1_dense":
        yield "norms_behind_rotation", norms_before_rotation, {}
    if family in ("gemma", "gemma2", "gemma3_text", "nemotron") or family.startswith(("qwen3_5", "qwen3_next")):
        yield "norm_offset", norm_offset, {}
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary", keep, {"rope_parameters": {**settings, "partial_rotary_factor": 1.0}}
    activation = getattr(cfg, "hidden_act", None) or cfg.hidden_activation
    if activation in _ACTIVATIONS:
        name, other = _ACTIVATIONS[activation]
        yield name, other_activation(other), {}
    if getattr(cfg, "logit_scale", 1.0) != 1.0:
        yield "logit_scale", unscaled_logits, {}
