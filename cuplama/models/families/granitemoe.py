"""Granite 3 with experts in place of every MLP (granite-3.1-3b-a800m)."""

from __future__ import annotations

from dataclasses import replace

from .experts import ALL_SPARSE, merged_experts, mlp_where_dense
from .granite import FAMILY as GRANITE
from .layout import LLAMA

__all__ = ["FAMILY"]

_MOE = "block_sparse_moe."

FAMILY = replace(
    GRANITE,
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    weights=mlp_where_dense(LLAMA)
    | merged_experts(f"{_MOE}router.layer.weight", f"{_MOE}input_linear.weight", f"{_MOE}output_linear.weight"),
    fields={
        **GRANITE.fields,
        "experts": ("num_local_experts", 8),
        "experts_per_token": ("num_experts_per_tok", 2),
        "expert_size": ("intermediate_size", 11008),
    },
    kinds=ALL_SPARSE,
    aliases={"num_experts": "num_local_experts"},
)
