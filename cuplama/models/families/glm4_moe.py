"""GLM-4.5 to 4.7: experts that are chosen by sigmoids with a correction, beside one that all tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import OFF, ONE_ROTATION, Family, Number, Router, fields
from .experts import correction, expert_weights, mlp_where_dense, shared_expert, sparse_where
from .layout import HEAD_NORMS, LLAMA

__all__ = ["FAMILY"]


def _has_experts(raw: Mapping[str, Any], layer: int) -> bool:
    return bool(layer >= raw.get("first_k_dense_replace", 1))


FAMILY = Family(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    {
        **mlp_where_dense(LLAMA),
        **{name: replace(recipe, when="qk_norm") for name, recipe in HEAD_NORMS.items()},
        **expert_weights(),
        **correction("mlp.gate.e_score_correction_bias"),
        **shared_expert("mlp.shared_experts"),
    },
    {
        **fields(intermediate_size=10944, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072),
        "experts": ("n_routed_experts", 128),
        "experts_per_token": ("num_experts_per_tok", 8),
        "expert_size": ("moe_intermediate_size", 1408),
        "shared_experts": ("n_shared_experts", 1),
    },
    flags={"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"},
    kinds=sparse_where(("first_k_dense_replace",), _has_experts),
    partial_rotary=True,
    rotations=replace(ONE_ROTATION, defaults={"partial_rotary_factor": 0.5}),
    neutral={"mlp_bias": OFF, "num_nextn_predict_layers": (None, 0, 1)},
    ignored=("num_mtp_layers",),
    router=Router(
        settings={
            "sigmoid": 1,
            "groups": ("n_group", 1),
            "kept": ("topk_group", 1),
            "renormalise": ("norm_topk_prob", True),
            "factor": Number("routed_scaling_factor", 1.0),
        }
    ),
    aliases={"num_local_experts": "n_routed_experts"},
    left_out=("model.layers.{num_layers}.",),  # a further layer, which predicts more tokens at a time
)
