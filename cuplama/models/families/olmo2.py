"""OLMo 2: norms behind attention and MLP alone, and over all queries and all keys of a token together."""

from __future__ import annotations

from ..family import OFF, Family, fields
from .layout import POST_NORMS, WIDE_NORMS

__all__ = ["FAMILY", "OLMO"]

OLMO = POST_NORMS | WIDE_NORMS

FAMILY = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    OLMO,
    fields(rms_norm_eps=1e-5),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
)
