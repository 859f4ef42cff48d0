"""GLM-4 of 2024: Llama whose rotation turns neighbours in half of each head; one matrix for gate and up."""

from __future__ import annotations

from dataclasses import replace

from ..family import OFF, ONE_ROTATION, Family, fields, one
from .layout import LAYER, LLAMA

__all__ = ["FAMILY"]

_WEIGHTS = {**LLAMA, "{i}.gate_up_proj": one("2*f,d", LAYER + "mlp.gate_up_proj.weight")}
_FIELDS = fields(num_key_value_heads=2, head_dim=128, rms_norm_eps=1.5625e-7, max_position_embeddings=131072)

FAMILY = Family(
    "GlmForCausalLM",
    "glm",
    _WEIGHTS,
    _FIELDS,
    flags={"qkv_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
    partial_rotary=True,
    rope="rope_pairs",
    rotations=replace(ONE_ROTATION, defaults={"partial_rotary_factor": 0.5}),
)
