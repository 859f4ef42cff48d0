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
}
