"""The golden models of training: a row per case, with what its config says beside the sizes that all share.

Sizes are odd where a family and the kernels allow it (a head has a multiple of 8 elements), so that no tile is full. A
case is a model that trains: every family, one and three KV heads, a head size of its own, biases, tied heads, a window
shorter than the text, three rope scalings.
"""

from __future__ import annotations

from typing import Any

from tools.goldens.case import Case, Config, rope
from tools.goldens.training_more import more_training_cases

__all__ = ["ADAMW", "CASES", "ROWS", "STEPS", "TOKENS"]

ROWS, TOKENS = 3, 23  # a batch of gradients: ROWS rows of TOKENS + 1 ids, of which TOKENS are predicted
STEPS = 10  # of the AdamW case

ORIGINAL = 12  # the original context of a scaled rope: shorter than TOKENS

SMALL: Config = {
    "hidden_size": 27,
    "intermediate_size": 35,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2e-3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: Config = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 41,
    "n_positions": 40,
    "vocab_size": 61,
    "layer_norm_epsilon": 2e-3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WHOLE: Config = {key: value for key, value in SMALL.items() if key != "head_dim"} | {"hidden_size": 24}
"""Of families whose heads have hidden_size / num_attention_heads elements."""
PHI3: Config = {**WHOLE, "num_key_value_heads": 3, "original_max_position_embeddings": 64, "pad_token_id": None}

CASES: dict[str, Case] = {
    "llama-1-kv-head": Case("llama", {}, SMALL),
    "llama-3-kv-heads": Case(
        "llama", {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, SMALL
    ),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}, SMALL),
    "llama-tied": Case("llama", {"tie_word_embeddings": True, "head_dim": 24}, SMALL),
    "llama-rope-linear": Case("llama", rope("linear", factor=4.0), SMALL),
    "llama-rope-llama3": Case(
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=ORIGINAL,
        ),
        SMALL,
    ),
    "llama-rope-yarn": Case("llama", rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=ORIGINAL), SMALL),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}, WHOLE),
    "qwen3": Case("qwen3", {}, SMALL),
    "mistral-window": Case("mistral", {"sliding_window": 7}, SMALL),
    "phi3": Case("phi3", {}, PHI3),
    "gpt2": Case("gpt2", {}, GPT2),
    **more_training_cases(SMALL, WHOLE),
}

ADAMW: dict[str, Any] = {
    "case": "llama-tied",
    "lr": 3e-3,
    "floor": 0.1,
    "warmup": 3,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "grad_clip": 1.0,
}
"""The settings of the steps: the model is the one of a case."""
