"""GLM-4 of 2025 (GLM-4-0414, GLM-Z1): GLM with norms behind attention and MLP as well."""

from __future__ import annotations

from ..family import OFF, Family, one
from .glm import GLM, GLM_FIELDS, HALF_ROTATION
from .layout import LAYER

__all__ = ["FAMILY"]

_WEIGHTS = {
    **GLM,
    "{i}.attn_post_norm": one("d", LAYER + "post_self_attn_layernorm.weight"),
    "{i}.mlp_post_norm": one("d", LAYER + "post_mlp_layernorm.weight"),
}

FAMILY = Family(
    "Glm4ForCausalLM",
    "glm4",
    _WEIGHTS,
    GLM_FIELDS,
    flags={"qkv_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
    partial_rotary=True,
    rope="rope_pairs",
    rotations=HALF_ROTATION,
)
