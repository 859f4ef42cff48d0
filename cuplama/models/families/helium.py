"""Helium: Llama whose heads rotate neighbour by neighbour."""

from __future__ import annotations

from dataclasses import replace

from ..family import ONE_ROTATION, Family, fields
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "HeliumForCausalLM",
    "helium",
    LLAMA,
    fields(num_key_value_heads=20, head_dim=128, rms_norm_eps=1e-8, max_position_embeddings=4096),
    flags={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    rope="rope_pairs",
    rotations=replace(ONE_ROTATION, defaults={"rope_theta": 100000.0}),
)
