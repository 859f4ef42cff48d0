"""Mixtral: Mistral with experts in place of every MLP."""

from __future__ import annotations

from dataclasses import replace

from ..family import OFF, ONE_ROTATION, Family, fields, window_everywhere
from .experts import ALL_SPARSE, expert_weights, mlp_where_dense
from .layout import LLAMA

__all__ = ["FAMILY"]

FAMILY = Family(
    "MixtralForCausalLM",
    "mixtral",
    mlp_where_dense(LLAMA) | expert_weights("block_sparse_moe", ("w1", "w3", "w2")),
    {
        **fields(intermediate_size=14336, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072),
        "experts": ("num_local_experts", 8),
        "experts_per_token": ("num_experts_per_tok", 2),
        "expert_size": ("intermediate_size", 14336),
    },
    windows=window_everywhere(None),
    kinds=ALL_SPARSE,
    rotations=replace(ONE_ROTATION, defaults={"rope_theta": 1e6}),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
    ignored=("router_jitter_noise",),  # noise of training
    aliases={"num_experts": "num_local_experts"},
)
