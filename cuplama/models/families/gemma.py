"""Gemma 1, and what all Gemmas share: weights of norms are 1 + w, embeddings are multiplied by sqrt(d), GELU gates."""

from __future__ import annotations

import math
from typing import Any

from ..family import GELU, OFF, Family, Number, fields, one
from .layout import LAYER, LLAMA, POST_NORMS

__all__ = ["FAMILY", "GATED_GELU", "GEMMA", "GEMMA_NUMBERS", "gemma_fields"]

# From Gemma 2 on: norms before and behind attention and MLP.
GEMMA = {
    **LLAMA,
    **POST_NORMS,
    "{i}.mlp_norm": one("d", LAYER + "pre_feedforward_layernorm.weight"),
}

GATED_GELU = {name: f"{op}_mul" for name, op in GELU.items()}

_EMBEDDING_SCALE = {"embedding_scale": Number("hidden_size", make=math.sqrt)}
GEMMA_NUMBERS = {
    **_EMBEDDING_SCALE,
    "attention_scale": Number("query_pre_attn_scalar", 256, lambda size: float(size**-0.5)),
}


def gemma_fields(**defaults: Any) -> dict[str, tuple[str, Any]]:
    """The config fields from Gemma 2 on, with these defaults as config.json names them."""
    found = fields(num_key_value_heads=4, head_dim=256, **defaults)
    return {**found, "activation": ("hidden_activation", "gelu_pytorch_tanh")}


FAMILY = Family(
    "GemmaForCausalLM",
    "gemma",
    LLAMA,
    fields(num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192),
    # The first files say "gelu", and their model was trained with the other one.
    activations={**GATED_GELU, "gelu": "gelu_tanh_mul"},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    # Some versions of transformers read "hidden_activation" in place of "hidden_act".
    neutral={"mlp_bias": OFF, "hidden_activation": (None, "gelu_pytorch_tanh")},
    tied=True,
    norm_offset=1.0,
    numbers=_EMBEDDING_SCALE,
)
