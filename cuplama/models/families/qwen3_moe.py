"""Qwen3-MoE: Qwen3 with experts in place of most MLPs, or of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import OFF, WINDOW_IF_USED, Family, Router, fields
from .experts import expert_weights, mlp_where_dense, sparse_where
from .layout import HEAD_NORMS, LLAMA

__all__ = ["FAMILY", "QWEN_ROUTER", "QWEN_SPARSE"]


def _has_experts(raw: Mapping[str, Any], layer: int) -> bool:
    every = (layer + 1) % raw.get("decoder_sparse_step", 1) == 0
    return every and layer not in (raw.get("mlp_only_layers") or ()) and raw.get("num_experts") != 0


QWEN_SPARSE = sparse_where(("decoder_sparse_step", "mlp_only_layers"), _has_experts)
QWEN_ROUTER = Router(settings={"renormalise": ("norm_topk_prob", False)})

FAMILY = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    mlp_where_dense(LLAMA | HEAD_NORMS) | expert_weights(),
    {
        **fields(intermediate_size=6144, num_key_value_heads=4, max_position_embeddings=32768),
        "experts": ("num_experts", 128),
        "experts_per_token": ("num_experts_per_tok", 8),
        "expert_size": ("moe_intermediate_size", 768),
    },
    windows=WINDOW_IF_USED,
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    kinds=QWEN_SPARSE,
    neutral={"mlp_bias": OFF},
    ignored=("max_window_layers",),  # the window, if it is on, is that of every layer
    router=QWEN_ROUTER,
    aliases={"num_local_experts": "num_experts"},
)
