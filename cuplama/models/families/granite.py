"""Granite 3: Llama with multipliers of the embedding, of attention, of what layers add, and of logits."""

from __future__ import annotations

from ..family import OFF, Family, Number, fields
from .layout import LLAMA

__all__ = ["FAMILY", "GRANITE_NUMBERS"]

GRANITE_NUMBERS = {
    "embedding_scale": Number("embedding_multiplier", 1.0),
    "residual_scale": Number("residual_multiplier", 1.0),
    "attention_scale": Number("attention_multiplier", 1.0),
    "logits_scale": Number("logits_scaling", 1.0, lambda divisor: 1 / divisor),
}

FAMILY = Family(
    "GraniteForCausalLM",
    "granite",
    LLAMA,
    fields(),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    neutral={"sliding_window": (None,), "use_sliding_window": OFF},
    numbers=GRANITE_NUMBERS,
)
