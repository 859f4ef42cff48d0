"""ERNIE 4.5, the dense ones: Llama whose heads rotate neighbour by neighbour."""

from __future__ import annotations

from dataclasses import replace

from ..family import ONE_ROTATION, Family, fields
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "Ernie4_5ForCausalLM",
    "ernie4_5",
    LLAMA,
    fields(num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=131072),
    flags={"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"},
    tied=True,
    rope="rope_pairs",
    rotations=replace(ONE_ROTATION, defaults={"rope_theta": 500000.0}),
)
