"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from ..family import OFF, Family, fields, window_everywhere
from .layout import LLAMA, MISTRAL3

__all__ = ["FAMILY"]


FAMILY = Family(
    "MistralForCausalLM",
    "mistral",
    LLAMA,
    fields(num_key_value_heads=8, max_position_embeddings=131072),
    windows=window_everywhere(4096),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
    wrappers=(MISTRAL3,),
)
