"""Golden models of families whose layers are put together otherwise than Llama's, or have another activation."""

from __future__ import annotations

from tools.goldens.case import SMALL, Case, Config, O, rope

__all__ = ["MORE_CASES"]

LLAMA3: Config = rope(
    "llama3", 5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=O
)
# Heads that are wider than the hidden size has room for, three to a head of keys.
WIDE: Config = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}


def layer_norms(size: Config, eps: str = "layer_norm_eps") -> Config:
    """Sizes with the epsilon of LayerNorm under its own name."""
    return {eps if name == "rms_norm_eps" else name: value for name, value in size.items()}


MORE_CASES: dict[str, Case] = {
    "seed-oss": Case("seed_oss", {**WIDE, **rope("default", 1e6)}),
    "exaone4-hybrid": Case("exaone4", {"num_hidden_layers": 4, "sliding_window": 8, **rope("default", 1e5)}),
    "exaone4-full": Case(
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True, **LLAMA3},
    ),
    # "dynamic" with an alpha does not depend on the length; files of this family have the other numbers beside it.
    "hunyuan": Case(
        "hunyuan_v1_dense",
        {
            **WIDE,
            **rope("dynamic", alpha=50.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    "phi": Case(
        "phi",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            **rope("default", partial_rotary_factor=0.4),
        },
        layer_norms(SMALL),
    ),
    "nemotron": Case(
        "nemotron", {**WIDE, **rope("default", partial_rotary_factor=0.5)}, layer_norms(SMALL, "norm_eps")
    ),
    "arcee": Case(
        "arcee",
        {
            "attention_bias": True,
            "mlp_bias": True,
            **rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=O, beta_fast=2.0, beta_slow=0.5),
        },
    ),
    "cohere2": Case(
        "cohere2",
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "sliding_window": 8,
            "logit_scale": 0.25,
            **rope("default", 50000.0),
        },
        layer_norms(SMALL),
    ),
    "ernie45": Case("ernie4_5", {**WIDE, **rope("default", 500000.0)}),
    "ernie45-bias": Case("ernie4_5", {**WIDE, "use_bias": True, "tie_word_embeddings": False}),
    "helium": Case("helium", {"head_dim": 16, **rope("default", 100000.0)}),
    "stablelm": Case(
        "stablelm",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "use_qkv_bias": True,
            **rope("default", partial_rotary_factor=0.25),
        },
        layer_norms(SMALL),
    ),
    "starcoder2": Case(
        "starcoder2",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "sliding_window": 8,
            "tie_word_embeddings": True,
            **rope("default", 1e6),
        },
        layer_norms(SMALL, "norm_epsilon"),
        spelling="v4",
    ),
    "apertus": Case("apertus", {"num_attention_heads": 4, "num_key_value_heads": 2, **LLAMA3}),
    "internlm2": Case(
        "internlm2",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 48,
            "attention_bias": True,
            **rope("default", 1e6),
        },
        spelling="internlm2",
    ),
    "internlm3": Case(
        "internlm3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": O,
            "attention_bias": True,
            "mlp_bias": True,
            **rope("dynamic", factor=6.0),
        },
        spelling="internlm3",
        sequential=True,
    ),
}
