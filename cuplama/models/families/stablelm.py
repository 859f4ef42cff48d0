"""StableLM: Llama with LayerNorm, of whose heads a part rotates."""

from __future__ import annotations

from dataclasses import replace

from ..family import OFF, ONE_ROTATION, Family, fields
from .layout import LLAMA, NORM_BIASES

__all__ = ["FAMILY"]


FAMILY = Family(
    "StableLmForCausalLM",
    "stablelm",
    {**LLAMA, **NORM_BIASES},
    {**fields(num_key_value_heads=32, max_position_embeddings=4096), "eps": ("layer_norm_eps", 1e-5)},
    norm="layer_norm",
    flags={"qkv_bias": "use_qkv_bias"},
    rotations=replace(ONE_ROTATION, defaults={"partial_rotary_factor": 0.25}),
    partial_rotary=True,
    neutral={"use_parallel_residual": OFF, "attention_bias": OFF, "mlp_bias": OFF},  # StableLM 2 12B is parallel
)
