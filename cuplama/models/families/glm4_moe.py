"""GLM-4.5 to 4.7: experts that are chosen by sigmoids with a correction, beside one that all tokens share."""

from __future__ import annotations

from dataclasses import replace

from ..family import OFF, ONE_ROTATION, Family, fields
from .experts import correction, expert_weights, mlp_where_dense, router_by_groups, shared_expert, sparse_behind
from .layout import HEAD_NORMS, LLAMA

__all__ = ["FAMILY"]


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
    kinds=sparse_behind(1),
    partial_rotary=True,
    rotations=replace(ONE_ROTATION, defaults={"partial_rotary_factor": 0.5}),
    neutral={"mlp_bias": OFF, "num_nextn_predict_layers": (None, 0, 1)},
    ignored=("num_mtp_layers",),
    router=router_by_groups(renormalise=True),
    aliases={"num_local_experts": "n_routed_experts"},
    left_out=("model.layers.{num_layers}.",),  # a further layer, which predicts more tokens at a time
)
