"""OLMo 2: norms behind attention and MLP alone, and over all queries and all keys of a token together."""

from __future__ import annotations

from ..family import OFF, Family, fields, one
from .layout import KV_ROWS, LAYER, POST_NORMS, Q_ROWS

__all__ = ["FAMILY", "OLMO"]

OLMO = {
    **POST_NORMS,
    "{i}.q_norm": one(Q_ROWS, LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one(KV_ROWS, LAYER + "self_attn.k_norm.weight"),
}

FAMILY = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    OLMO,
    fields(rms_norm_eps=1e-5),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
)
