"""Qwen3: RMSNorm over each query and key head."""

from __future__ import annotations

from ..family import OFF, WINDOW_BY_LAYER, Family, fields, one
from .layout import LAYER, LLAMA

__all__ = ["FAMILY"]

_WEIGHTS = {
    **LLAMA,
    "{i}.q_norm": one("D", LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one("D", LAYER + "self_attn.k_norm.weight"),
}

FAMILY = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    _WEIGHTS,
    fields(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
    windows=WINDOW_BY_LAYER,
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
)
