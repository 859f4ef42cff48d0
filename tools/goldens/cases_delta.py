"""The golden models whose layers have a gated delta rule in place of attention."""

from __future__ import annotations

from tools.goldens.case import SMALL, Case, Config, rope

__all__ = ["DELTA_CASES"]

DELTA: Config = {
    **SMALL,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    **rope("default", 1000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
}

EXPERTS: Config = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}

DELTA_CASES: dict[str, Case] = {
    "qwen35": Case("qwen3_5_text", {}, DELTA),
    # A state that nothing behind it reads, and attention that begins.
    "qwen35-types": Case(
        "qwen3_5_text",
        {
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "linear_conv_kernel_dim": 3,
            "linear_num_value_heads": 2,
            "tie_word_embeddings": True,
        },
        DELTA,
    ),
    "qwen35-moe": Case(
        "qwen3_5_moe_text",
        {**EXPERTS, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        DELTA,
    ),
    "qwen3-next": Case(
        "qwen3_next",
        {
            **EXPERTS,
            "mlp_only_layers": [0, 1, 3],
            "norm_topk_prob": False,
        },
        DELTA,
        spelling="v4",
    ),
}
