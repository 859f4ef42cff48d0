"""The golden models of training of further families: what each has beside Llama is on.

None has a token of padding, as some classes have by default: torch gives its row of the embedding no gradient.
"""

from __future__ import annotations

from tools.goldens.case import Case, Config, rope

__all__ = ["more_training_cases"]

MIXED: Config = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA: Config = {"query_pre_attn_scalar": 40, "sliding_window": 7, "tie_word_embeddings": True, "rms_norm_eps": 3e-2}
YARN: Config = {"factor": 4.0, "original_max_position_embeddings": 12, "beta_fast": 2.0, "beta_slow": 0.5}


def more_training_cases(small: Config, whole: Config) -> dict[str, Case]:
    """small: a base of sizes with a head size of its own; whole: one whose heads divide the hidden size."""
    small, whole = ({**base, "pad_token_id": None} for base in (small, whole))
    centred = {key: value for key, value in whole.items() if key != "rms_norm_eps"}  # of families with LayerNorm
    scales = {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 6.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
    }
    rotations = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    tempered = rope("yarn", 1000.0, **YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.6)
    return {
        "arcee": Case("arcee", {"attention_bias": True, "mlp_bias": True}, whole),
        "cohere2": Case(
            "cohere2",
            {"layer_norm_eps": 2e-3, "logit_scale": 0.25, "tie_word_embeddings": True, **MIXED},
            centred,
        ),
        "ernie45": Case("ernie4_5", {"use_bias": True}, small),
        "exaone4": Case("exaone4", {"rms_norm_eps": 3e-2, **MIXED}, whole),
        "gemma": Case("gemma", {"tie_word_embeddings": True, "rms_norm_eps": 3e-2}, small),
        "gemma2": Case("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 12.0, **GEMMA}, small),
        "gemma3": Case("gemma3_text", {**GEMMA, **MIXED, "rope_parameters": rotations}, small),
        "glm": Case("glm", {}, small),
        "glm4": Case("glm4", {"attention_bias": True}, small),
        "granite": Case("granite", scales, whole),
        "helium": Case("helium", {"hidden_size": 48}, small),
        "hunyuan": Case("hunyuan_v1_dense", {}, small),
        "ministral3": Case("ministral3", tempered, small),
        "nemotron": Case("nemotron", {"norm_eps": 2e-3}, centred),
        "olmo2": Case("olmo2", {}, whole),
        "olmo3": Case("olmo3", {**MIXED}, whole),
        "phi": Case("phi", {"layer_norm_eps": 3e-2}, centred),
        "seed-oss": Case("seed_oss", {}, small),
        "smollm3": Case("smollm3", {"no_rope_layers": [1, 0]}, whole),
        "stablelm": Case("stablelm", {"layer_norm_eps": 2e-3, "use_qkv_bias": True, "hidden_size": 48}, centred),
        "starcoder2": Case("starcoder2", {"norm_epsilon": 2e-3, "sliding_window": 7}, centred),
    }
