"""Qwen3: RMSNorm over each query and key head."""

from __future__ import annotations

from ..family import OFF, WINDOW_BY_LAYER, Family, fields
from .layout import HEAD_NORMS, LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    LLAMA | HEAD_NORMS,
    fields(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
    windows=WINDOW_BY_LAYER,
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
)
