"""Gemma 2: norms before and behind attention and MLP, soft limits of scores and logits, a window in every other one."""

from __future__ import annotations

from ..family import Family, Number, window_by_pattern
from .gemma import GATED_GELU, GEMMA, GEMMA_NUMBERS, gemma_fields

__all__ = ["FAMILY"]


FAMILY = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    GEMMA,
    gemma_fields(max_position_embeddings=8192),
    activations=GATED_GELU,
    windows=window_by_pattern(4096, 2),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    tied=True,
    norm_offset=1.0,
    numbers={
        **GEMMA_NUMBERS,
        "attention_cap": Number("attn_logit_softcapping", 50.0),
        "logits_cap": Number("final_logit_softcapping", 30.0),
    },
    ignored=("hidden_act", "cache_implementation", "sliding_window_size"),
)
