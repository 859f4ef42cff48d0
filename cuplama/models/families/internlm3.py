"""InternLM 3: Llama, with other names of the switches for biases."""

from __future__ import annotations

from ..family import OFF, Family, fields
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "InternLM3ForCausalLM",
    "internlm3",
    LLAMA,
    fields(num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=32768),
    flags={"qkv_bias": "qkv_bias", "o_bias": "bias", "mlp_bias": "bias"},
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
)
