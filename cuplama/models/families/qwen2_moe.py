"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one beside them that all tokens share, behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import OFF, Family, Windows, fields, one
from .experts import expert_weights, mlp_where_dense, shared_expert
from .layout import LAYER, LLAMA
from .qwen3_moe import QWEN_ROUTER, QWEN_SPARSE

__all__ = ["FAMILY"]


def _windows(raw: Mapping[str, Any], layers: int) -> list[int]:
    """In the layers that ``layer_types`` names; else, if the window is on, in every other one of the first layers."""
    window = raw.get("sliding_window", 4096) or 0 if raw.get("use_sliding_window") else 0
    if types := raw.get("layer_types"):
        return [window * (kind == "sliding_attention") for kind in types]
    first = raw.get("max_window_layers", 28)
    return [window * (i % 2 == 0 and i < first) for i in range(layers)]


_SHARED_GATE = one("1,d", LAYER + "mlp.shared_expert_gate.weight", when="shared_size", only="sparse")

FAMILY = Family(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    {
        **mlp_where_dense(LLAMA),
        **expert_weights(),
        **shared_expert("mlp.shared_expert"),
        "{i}.shared_gate": _SHARED_GATE,
    },
    {
        **fields(intermediate_size=5632, num_key_value_heads=16, max_position_embeddings=32768),
        "experts": ("num_experts", 60),
        "experts_per_token": ("num_experts_per_tok", 4),
        "expert_size": ("moe_intermediate_size", 1408),
        "shared_size": ("shared_expert_intermediate_size", 5632),
    },
    windows=Windows(("sliding_window", "use_sliding_window", "max_window_layers"), _windows),
    flags={"qkv_bias": ("qkv_bias", True)},
    kinds=QWEN_SPARSE,
    neutral={"mlp_bias": OFF},
    router=QWEN_ROUTER,
)
