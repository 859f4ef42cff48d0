"""Qwen2 and Qwen2.5: Llama with biases of q, k and v, and windows by layer."""

from __future__ import annotations

from ..family import OFF, WINDOW_BY_LAYER, Family, fields
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    LLAMA,
    fields(num_key_value_heads=32, max_position_embeddings=32768),
    windows=WINDOW_BY_LAYER,
    flags={"qkv_bias": True},
    neutral={"mlp_bias": OFF},
    ignored=("attention_bias",),  # q, k and v have biases, the output has none, whatever it says
)
