"""GLM-4 of 2025 (GLM-4-0414, GLM-Z1): GLM with norms behind attention and MLP as well."""

from __future__ import annotations

from dataclasses import replace

from ..family import one
from .glm import FAMILY as GLM_2024
from .layout import LAYER

__all__ = ["FAMILY"]

_WEIGHTS = {
    **GLM_2024.weights,
    "{i}.attn_post_norm": one("d", LAYER + "post_self_attn_layernorm.weight"),
    "{i}.mlp_post_norm": one("d", LAYER + "post_mlp_layernorm.weight"),
}

FAMILY = replace(GLM_2024, architecture="Glm4ForCausalLM", model_type="glm4", weights=_WEIGHTS)
