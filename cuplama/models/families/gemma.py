"""What the Gemmas share: weights of norms are 1 + w, embeddings are multiplied by sqrt(d), the GELU gates."""

from __future__ import annotations

import math
from typing import Any

from ..family import GELU, Number, fields, one
from .layout import LAYER, LLAMA, POST_NORMS

__all__ = ["GATED_GELU", "GEMMA", "GEMMA_NUMBERS", "gemma_fields"]

GEMMA = {
    **LLAMA,
    **POST_NORMS,
    "{i}.mlp_norm": one("d", LAYER + "pre_feedforward_layernorm.weight"),
}

GATED_GELU = {name: f"{op}_mul" for name, op in GELU.items()}

GEMMA_NUMBERS = {
    "embedding_scale": Number("hidden_size", make=math.sqrt),
    "attention_scale": Number("query_pre_attn_scalar", 256, lambda size: float(size**-0.5)),
}


def gemma_fields(**defaults: Any) -> dict[str, tuple[str, Any]]:
    """Gemma's config fields, with these defaults as config.json names them."""
    found = fields(num_key_value_heads=4, head_dim=256, **defaults)
    return {**found, "activation": ("hidden_activation", "gelu_pytorch_tanh")}
