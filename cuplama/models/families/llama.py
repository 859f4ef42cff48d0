"""Llama 1 to 3.2, and what has its shape: TinyLlama, SmolLM2."""

from __future__ import annotations

from ..family import OFF, Family, fields
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "LlamaForCausalLM",
    "llama",
    LLAMA,
    fields(),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    neutral={"sliding_window": (None,), "use_sliding_window": OFF},
    ignored=("max_window_layers",),
)
