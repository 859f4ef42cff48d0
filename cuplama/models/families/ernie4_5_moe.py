"""ERNIE 4.5 with experts, some of which all tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import OFF
from .ernie4_5 import FAMILY as ERNIE
from .experts import correction, expert_weights, mlp_where_dense, shared_expert, sparse_where
from .layout import LLAMA

__all__ = ["FAMILY"]


def _has_experts(raw: Mapping[str, Any], layer: int) -> bool:
    first, last = raw.get("moe_layer_start_index", 1), raw.get("moe_layer_end_index", -1)
    every = (layer + 1) % raw.get("moe_layer_interval", 1) == 0
    return bool(every and first <= layer <= (layer if last == -1 else last))


FAMILY = replace(
    ERNIE,
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    weights={
        **mlp_where_dense(LLAMA),
        **expert_weights(),
        **correction("mlp.moe_statics.e_score_correction_bias", row=True),
        **shared_expert("mlp.shared_experts"),
    },
    fields={
        **ERNIE.fields,
        "num_kv_heads": ("num_key_value_heads", 4),
        "head_dim": ("head_dim", None),
        "intermediate_size": ("intermediate_size", 12288),
        "experts": ("moe_num_experts", 64),
        "experts_per_token": ("moe_k", 6),
        "expert_size": ("moe_intermediate_size", 1536),
        "shared_experts": ("moe_num_shared_experts", 2),
    },
    kinds=sparse_where(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _has_experts),
    neutral={"moe_norm_min": (None, 1e-12), "use_bias": OFF, "num_nextn_predict_layers": (None, 0, 1)},
    ignored=("moe_capacity", "moe_gate", "moe_use_aux_free"),
    aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    left_out=("model.mtp_",),
)
