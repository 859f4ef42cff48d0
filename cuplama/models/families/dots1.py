"""dots.llm1: the experts of GLM-4.5 and the attention of Qwen3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import OFF, REQUIRED, Family, Windows, fields
from .experts import correction, expert_weights, mlp_where_dense, router_by_groups, shared_expert, sparse_behind
from .layout import HEAD_NORMS, LLAMA

__all__ = ["FAMILY"]


def _windows(raw: Mapping[str, Any], layers: int) -> list[int]:
    """In the layers that ``layer_types`` names, or from ``max_window_layers`` on."""
    window, first = raw.get("sliding_window", 4096) or 0, raw.get("max_window_layers", 62)
    types: Sequence[str] = raw.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
    return [window if kind == "sliding_attention" else 0 for kind in types]


FAMILY = Family(
    "Dots1ForCausalLM",
    "dots1",
    {
        **mlp_where_dense(LLAMA | HEAD_NORMS),
        **expert_weights(),
        **correction("mlp.gate.e_score_correction_bias"),
        **shared_expert("mlp.shared_experts"),
    },
    {
        **fields(intermediate_size=10944, num_key_value_heads=32),
        "experts": ("n_routed_experts", REQUIRED),
        "experts_per_token": ("num_experts_per_tok", REQUIRED),
        "expert_size": ("moe_intermediate_size", 1408),
        "shared_experts": ("n_shared_experts", REQUIRED),
    },
    windows=Windows(("sliding_window", "max_window_layers"), _windows),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    kinds=sparse_behind(0),
    neutral={"mlp_bias": OFF, "moe_layer_freq": (None, 1), "scoring_func": (None, "sigmoid", "noaux_tc")},
    ignored=("use_sliding_window",),  # transformers goes by the two other fields
    router=router_by_groups(renormalise=False),
    aliases={"num_local_experts": "n_routed_experts"},
)
