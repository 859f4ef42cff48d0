"""FlexOlmo: OLMo 2 with experts in place of every MLP."""

from __future__ import annotations

from dataclasses import replace

from ..family import OFF, ONE_ROTATION, Family, Router, fields
from .experts import ALL_SPARSE, expert_weights, mlp_where_dense
from .olmo2 import OLMO

__all__ = ["FAMILY"]

FAMILY = Family(
    "FlexOlmoForCausalLM",
    "flex_olmo",
    mlp_where_dense(OLMO) | expert_weights(),
    {
        **fields(intermediate_size=11008, max_position_embeddings=4096),
        "experts": ("num_experts", 7),
        "experts_per_token": ("num_experts_per_tok", 5),
        "expert_size": ("intermediate_size", 11008),
    },
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    kinds=ALL_SPARSE,
    rotations=replace(ONE_ROTATION, defaults={"rope_theta": 5e5}),
    neutral={"mlp_bias": OFF},
    router=Router(settings={"renormalise": ("norm_topk_prob", False)}),
    aliases={"num_local_experts": "num_experts"},
)
