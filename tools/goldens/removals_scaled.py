"""What multipliers, soft limits, norms behind sublayers and rotations by layer change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tools.goldens.case import Config

__all__ = ["scaled_removals"]

Mutate = Callable[[Any], None]

# Fields of config.json that multiply or limit something -> a value of no effect, where it is always the same.
NUMBERS: Config = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
# Norms of a layer that may be missing without another size changing.
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "post_self_attn_layernorm", "post_mlp_layernorm",
)  # fmt: skip


def without(norm: str) -> Mutate:
    """A norm of each layer left out."""

    def mutate(model: Any) -> None:
        for layer in model.model.layers:
            setattr(layer, norm, nn.Identity())

    return mutate


def unscaled_embedding(model: Any) -> None:
    """Rows of the embedding as they are stored."""
    model.model.embed_tokens.embed_scale.fill_(1.0)


def heads_normalised(model: Any) -> None:
    """Queries and keys normalised head by head, where all heads of a token are normalised together."""

    def by_head(norm: Any, d: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(-1, (-1, d))
            normed: torch.Tensor = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
            return norm.weight * normed.flatten(-2)

        return forward

    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.forward = by_head(norm, layer.self_attn.head_dim)


def plain_values(model: Any) -> None:
    """Values as they come from their matrix."""
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "v_norm"):
            layer.self_attn.v_norm = nn.Identity()


def unscaled_layers(model: Any) -> None:
    """The residual stream as layers leave it."""
    for layer in model.model.layers:
        layer.layer_scalar.fill_(1.0)


def without_layer_inputs(part: str) -> Mutate:
    """One of the two parts of what layers are given of a token left out."""

    def mutate(model: Any) -> None:
        getattr(model.model, part).weight.data.zero_()

    return mutate


def rotated_in_every_layer(model: Any) -> None:
    """Rotation also in the layers that have none."""
    for layer in model.model.layers:
        layer.self_attn.use_rope = True


def one_rotation(model: Any) -> None:
    """The rotation of full attention in the layers with a window too."""
    rotary = model.model.rotary_emb
    size = len(rotary.sliding_attention_inv_freq)
    rotary.sliding_attention_inv_freq.copy_(rotary.full_attention_inv_freq[:size])


def keep(model: Any) -> None:
    """Change the config alone."""


def scaled_removals(model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides) of what the model has beside Llama's parts."""
    cfg, layer = model.config, model.model.layers[0]
    size = next(each.self_attn.head_dim for each in model.model.layers if hasattr(each, "self_attn"))
    for field, neutral in NUMBERS.items():
        if getattr(cfg, field, neutral) != neutral:
            yield field, keep, {field: neutral}
    for field, neutral in (("query_pre_attn_scalar", size), ("attention_multiplier", size**-0.5)):
        if hasattr(cfg, field):
            yield field, keep, {field: neutral}
    if hasattr(model.model.embed_tokens, "embed_scale"):
        yield "embedding_scale", unscaled_embedding, {}
    if hasattr(layer, "post_feedforward_layernorm") or hasattr(layer, "post_mlp_layernorm"):
        for norm in NORMS:
            if hasattr(layer, norm):
                yield norm, without(norm), {}
    if cfg.model_type in ("olmo2", "olmo3", "flex_olmo", "minimax_m2"):
        yield "whole_width", heads_normalised, {}
    if hasattr(layer, "layer_scalar"):
        yield "v_norm", plain_values, {}
        yield "layer_scalar", unscaled_layers, {}
    if getattr(cfg, "hidden_size_per_layer_input", 0):
        for part in ("embed_tokens_per_layer", "per_layer_model_projection"):
            yield part, without_layer_inputs(part), {}
        yield "post_per_layer_input_norm", without("post_per_layer_input_norm"), {}
    if 0 in getattr(cfg, "no_rope_layers", ()):
        yield "no_rope_layers", rotated_in_every_layer, {}
    if "full_attention" in cfg.rope_parameters:
        yield "one_rotation", one_rotation, {}
    if "llama_4_scaling_beta" in cfg.rope_parameters:
        yield "query_temperature", keep, {"rope_parameters": {**cfg.rope_parameters, "llama_4_scaling_beta": 0.0}}
