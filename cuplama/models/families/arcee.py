"""Arcee's foundation models: Llama with an MLP of squared ReLU, without a gate."""

from __future__ import annotations

from ..family import RELU_SQUARED, Family, fields
from .layout import UNGATED

__all__ = ["FAMILY"]


FAMILY = Family(
    "ArceeForCausalLM",
    "arcee",
    UNGATED,
    fields(rms_norm_eps=1e-5, hidden_act="relu2", max_position_embeddings=4096),
    activations=RELU_SQUARED,
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
)
