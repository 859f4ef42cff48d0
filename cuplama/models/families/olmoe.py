"""OLMoE: Llama with experts in place of every MLP, and norms over all queries and all keys of a token together."""

from __future__ import annotations

from ..family import OFF, Family, Router, fields
from .experts import ALL_SPARSE, expert_weights, mlp_where_dense
from .layout import LLAMA, WIDE_NORMS

__all__ = ["FAMILY"]

FAMILY = Family(
    "OlmoeForCausalLM",
    "olmoe",
    mlp_where_dense(LLAMA | WIDE_NORMS) | expert_weights(),
    {
        **fields(intermediate_size=2048, rms_norm_eps=1e-5, max_position_embeddings=4096),
        "experts": ("num_experts", 64),
        "experts_per_token": ("num_experts_per_tok", 8),
        "expert_size": ("intermediate_size", 2048),
    },
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    kinds=ALL_SPARSE,
    neutral={"mlp_bias": OFF},
    router=Router(settings={"renormalise": ("norm_topk_prob", False)}),
    aliases={"num_local_experts": "num_experts"},
)
