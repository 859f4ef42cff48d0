"""Seed-OSS: Llama with biases of q, k and v, and heads that together are wider than the hidden size."""

from __future__ import annotations

from ..family import Family, fields
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "SeedOssForCausalLM",
    "seed_oss",
    LLAMA,
    fields(num_key_value_heads=8, head_dim=128, max_position_embeddings=524288),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
)
