"""Qwen3.5 and 3.6 with experts in every layer, and one that all tokens share."""

from __future__ import annotations

from ..family import Family, Router, Wrapper, fields
from .delta import DELTA, DELTA_FIELDS, DELTA_ROTATIONS, DELTA_WINDOWS, GATED, delta_and
from .experts import ALL_SPARSE, either_way, expert_weights, mlp_where_dense
from .qwen2_moe import SHARED_EXPERT
from .qwen3_5 import DELTA_INPUTS, MTP, QWEN3_5_IGNORED, QWEN3_5_NEUTRAL

__all__ = ["FAMILY"]

FAMILY = Family(
    "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe_text",
    {
        **mlp_where_dense(GATED),
        **DELTA_INPUTS,
        **DELTA,
        **either_way(expert_weights(), "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        **SHARED_EXPERT,
    },
    {
        **fields(
            vocab_size=248320,
            hidden_size=2048,
            num_hidden_layers=40,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            max_position_embeddings=32768,
        ),
        **DELTA_FIELDS,
        "intermediate_size": ("moe_intermediate_size", 512),  # there are no layers without experts
        "experts": ("num_experts", 256),
        "experts_per_token": ("num_experts_per_tok", 8),
        "expert_size": ("moe_intermediate_size", 512),
        "shared_size": ("shared_expert_intermediate_size", 512),
    },
    windows=DELTA_WINDOWS,
    rotations=DELTA_ROTATIONS,
    kinds=delta_and(ALL_SPARSE),
    partial_rotary=True,
    norm_offset=1.0,
    neutral=QWEN3_5_NEUTRAL,
    ignored=(*QWEN3_5_IGNORED, "intermediate_size"),
    router=Router(settings={"renormalise": 1}),
    aliases={"num_local_experts": "num_experts"},
    wrappers=(
        Wrapper(
            ("Qwen3_5MoeForConditionalGeneration",),
            "qwen3_5_moe",
            ("model.language_model.",),
            ("model.visual.",),
        ),
    ),
    left_out=MTP,
)
