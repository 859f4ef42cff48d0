"""Golden models of families with experts. Sizes are odd, and some experts are chosen by no token of a prompt."""

from __future__ import annotations

from tools.goldens.case import Case, Config, O, rope

__all__ = ["EXPERT_CASES"]

HEADS: Config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

EXPERT_CASES: dict[str, Case] = {
    "mixtral": Case(
        "mixtral",
        {**HEADS, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None, **rope("default", 1e6)},
        spelling="v4",
    ),
    # A limit that the small model reaches, sinks, and windows in every second layer.
    "gpt-oss": Case(
        "gpt_oss",
        {
            **HEADS,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "intermediate_size": 24,
            "sliding_window": 8,
            "swiglu_limit": 0.75,
            "tie_word_embeddings": False,
            **rope(
                "yarn",
                150000.0,
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=O,
            ),
        },
        spelling="v4",
    ),
    "qwen3-moe": Case(
        "qwen3_moe",
        {
            **HEADS,
            "num_hidden_layers": 3,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            **rope("default", 1e6),
        },
        spelling="v4",
    ),
    "qwen3-moe-step": Case(
        "qwen3_moe",
        {
            **HEADS,
            "num_experts": 7,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
    "qwen2-moe": Case(
        "qwen2_moe",
        {
            **HEADS,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [0],
            **rope("default", 1e6),
        },
    ),
    "olmoe": Case(
        "olmoe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "intermediate_size": 20,
        },
    ),
    "granitemoe": Case(
        "granitemoe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "intermediate_size": 20,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.5,
        },
    ),
    "phimoe": Case(
        "phimoe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 20,
            "router_jitter_noise": 0.2,
            "attention_bias": True,
            "lm_head_bias": True,
            **rope("default", 1e6),
        },
    ),
    "glm4-moe": Case(
        "glm4_moe",
        {
            **HEADS,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
            **rope("default", 1e6, partial_rotary_factor=0.5),
        },
    ),
    # As it is published: the number of elements of a head that rotate, and not the part.
    "minimax-m2": Case(
        "minimax_m2",
        {
            **HEADS,
            "num_local_experts": 9,
            "num_experts_per_tok": 3,
            "intermediate_size": 20,
            **rope("default", 1e6, partial_rotary_factor=0.5),
        },
        spelling="minimax_m2",
    ),
    "dots1": Case(
        "dots1",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "n_routed_experts": 9,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "sliding_window": 8,
            "max_window_layers": 2,
            **rope("default", 1e6),
        },
        spelling="v4",
    ),
    "flex-olmo": Case(
        "flex_olmo",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 48,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "intermediate_size": 20,
            "pad_token_id": None,
            **rope("default", 500000.0),
        },
    ),
    "ernie45-moe": Case(
        "ernie4_5_moe",
        {
            **HEADS,
            "moe_num_experts": 9,
            "moe_k": 3,
            "moe_intermediate_size": 20,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "tie_word_embeddings": False,
            **rope("default", 500000.0),
        },
    ),
}
