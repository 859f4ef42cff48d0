"""Golden models of families that multiply or limit what Llama does not, or rotate by the type of a layer."""

from __future__ import annotations

from tools.goldens.case import SMALL, Case, Config, O, rope

__all__ = ["SCALED_CASES"]

# Heads that are wider than the hidden size has room for, with another scale than theirs, two to a head of keys.
GEMMA: Config = {
    **SMALL,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "rms_norm_eps": 3e-2,
}
GQA: Config = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
YARN: Config = {"factor": 4.0, "original_max_position_embeddings": O, "beta_fast": 2.0, "beta_slow": 0.5}
GLM: Config = {
    **GQA,
    "head_dim": 16,
    "pad_token_id": None,
    **rope("default", 1000.0, partial_rotary_factor=0.5),
}
GRANITE: Config = {
    **GQA,
    "attention_multiplier": 0.5,
    "embedding_multiplier": 6.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.5,
    "rms_norm_eps": 1e-2,
}

# Layers without a window have other heads; rotated: half of these.
GEMMA4: Config = {
    **{key: value for key, value in GEMMA.items() if key != "query_pre_attn_scalar"},
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 24,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}

SCALED_CASES: dict[str, Case] = {
    "gemma": Case(
        "gemma",
        {
            "hidden_size": 40,
            "intermediate_size": 56,
            "head_dim": 16,
            "attention_bias": True,
            "rms_norm_eps": 3e-2,
            **rope("default", 1000.0),
        },
        GQA,
        spelling="v4",
    ),
    "gemma2": Case(
        "gemma2",
        {"attention_bias": True, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 12.0},
        GEMMA,
        spelling="v4",
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        GEMMA,
        twins=True,
    ),
    "gemma4-shared": Case(
        "gemma4_text",
        {
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": 96,
            "final_logit_softcapping": 12.0,
        },
        GEMMA4,
    ),
    "gemma4-same": Case(
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "attention_bias": True},
        GEMMA4,
    ),
    "gemma4-experts": Case(
        "gemma4_text",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": True,
            "num_experts": 7,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
            "tie_word_embeddings": False,
        },
        GEMMA4,
    ),
    "olmo2": Case("olmo2", rope("default", 500000.0), GQA, spelling="v4"),
    "olmo3": Case(
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 100.0, **YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        GQA,
    ),
    # Every second layer does not rotate, and has a window.
    "smollm3": Case(
        "smollm3",
        {
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "pad_token_id": None,
            **rope("default", 5000000.0),
        },
        GQA,
        spelling="v4",
    ),
    "granite": Case(
        "granite", {"attention_bias": True, "mlp_bias": True, **rope("default", 10000000.0)}, GRANITE, spelling="v4"
    ),
    "granite4": Case(
        "granitemoehybrid",
        {
            "layer_types": ["full_attention"] * 2,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 40,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
        },
        {**GRANITE, "intermediate_size": 72},
    ),
    "glm": Case("glm", {}, GLM, spelling="v4"),
    "glm4": Case("glm4", {}, GLM),
    "ministral3": Case(
        "ministral3",
        {
            "head_dim": 16,
            **rope("yarn", 1000.0, **YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.6),
        },
        GQA,
    ),
}
