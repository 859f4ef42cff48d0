"""Nemotron and Minitron: LayerNorm with weights around zero, an MLP of squared ReLU, half of a head rotates."""

from __future__ import annotations

from dataclasses import replace

from ..family import ONE_ROTATION, RELU_SQUARED, Family, fields
from .layout import NORM_BIASES, UNGATED

__all__ = ["FAMILY"]


FAMILY = Family(
    "NemotronForCausalLM",
    "nemotron",
    {**UNGATED, **NORM_BIASES},
    {**fields(hidden_act="relu2", max_position_embeddings=4096), "eps": ("norm_eps", 1e-5)},
    activations=RELU_SQUARED,
    norm="layer_norm",
    norm_offset=1.0,
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    rotations=replace(ONE_ROTATION, defaults={"partial_rotary_factor": 0.5}),
    partial_rotary=True,
    neutral={"rope_percent": (None, 0.5), "rope_percentage": (None, 0.5)},  # older names, which transformers ignores
    ignored=("kv_channels",),  # an older name of head_dim, which the sizes of tensors show
)
