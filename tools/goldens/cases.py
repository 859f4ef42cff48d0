"""The golden models: a row per case. Those of further families are in cases_NAME.py."""

from __future__ import annotations

from tools.goldens.case import SMALL, Case, Config, O, rope
from tools.goldens.cases_experts import EXPERT_CASES
from tools.goldens.cases_more import MORE_CASES
from tools.goldens.cases_scaled import SCALED_CASES

__all__ = ["CASES", "Case", "Config"]

GPT2: Config = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 80,
    "vocab_size": 96,
    "layer_norm_epsilon": 2e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PHI3: Config = {**SMALL, "pad_token_id": None}  # the default, 32000, is outside our vocabulary
SHORT = [1.0, 1.05, 1.1, 1.3, 1.2, 1.6, 1.4, 2.0]
LONG = [1.1, 1.5, 2.5, 2.0, 4.0, 6.5, 8.0, 7.5]

CASES: dict[str, Case] = {
    "llama1-mha": Case("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, spelling="v1"),
    "llama2": Case("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "llama3-gqa": Case(
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, **rope("default", 500000.0)},
        spelling="v4",
    ),
    "llama-rope-linear": Case("llama", rope("linear", factor=4.0)),
    "llama-rope-dynamic": Case("llama", {"max_position_embeddings": O, **rope("dynamic", factor=4.0)}, sequential=True),
    "llama31-rope-llama3": Case(
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=O,
        ),
        twins=True,
    ),
    "llama32-tied": Case(
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            **rope(
                "llama3",
                500000.0,
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=O,
            ),
        },
    ),
    "llama-attention-bias": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn-options": Case(
        "llama",
        rope(
            "yarn",
            100.0,
            factor=4.0,
            original_max_position_embeddings=O,
            beta_fast=2.0,
            beta_slow=0.5,
            mscale=1.0,
            mscale_all_dim=0.3,
            truncate=False,
        ),
    ),
    "smollm2": Case(
        "llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            **rope("default", 100000.0),
        },
    ),
    "mistral-window": Case("mistral", {"sliding_window": 8}, spelling="v4"),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True, **rope("default", 1000000.0)}, spelling="v4"),
    "qwen25-yarn": Case(
        "qwen2",
        # Qwen2.5 documents this very form: the context field stays at the trained length.
        {
            "max_position_embeddings": O,
            **rope("yarn", 500.0, factor=4.0, original_max_position_embeddings=O),
        },
        twins=True,
    ),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Case(
        "qwen3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            **rope("default", 1000000.0),
        },
    ),
    "phi3": Case("phi3", {"num_key_value_heads": 2, "original_max_position_embeddings": 128}, PHI3),
    "phi3-window": Case("phi3", {"sliding_window": 8, "original_max_position_embeddings": 128}, PHI3, spelling="v4"),
    "phi3-longrope": Case(
        "phi3",
        {
            "original_max_position_embeddings": O,
            **rope("longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=O),
        },
        PHI3,
        twins=True,
    ),
    "phi3-partial-rotary": Case(
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": O,
            **rope(
                "longrope",
                short_factor=SHORT[::2],
                long_factor=LONG[::2],
                partial_rotary_factor=0.5,
                original_max_position_embeddings=O,
            ),
        },
        PHI3,
        spelling="v4",
    ),
    "phi3-partial-default": Case(
        "phi3",
        {"original_max_position_embeddings": 128, **rope("default", partial_rotary_factor=0.5)},
        PHI3,
    ),
    "gpt2": Case("gpt2", {}, GPT2, context=80),
    "gpt2-char": Case(
        "gpt2",
        {"vocab_size": 65, "n_inner": None, "n_layer": 1, "bos_token_id": None, "eos_token_id": None},
        GPT2,
        context=80,
        chars=True,
    ),
    "gpt2-exact-gelu": Case("gpt2", {"activation_function": "gelu"}, GPT2, context=80),
    **MORE_CASES,
    **EXPERT_CASES,
    **SCALED_CASES,
}
