"""GPT-2: LayerNorm, learned positions, GELU; matrices stored transposed."""

from __future__ import annotations

from ..family import GELU, OFF, REQUIRED, Family, one

__all__ = ["FAMILY"]

_LAYER = "transformer.h.{i}."
_WEIGHTS = {
    "embed_tokens": one("V,d", "transformer.wte.weight", otherwise="lm_head.weight"),
    "lm_head": one("V,d", "lm_head.weight", otherwise="transformer.wte.weight"),
    "position_table": one("P,d", "transformer.wpe.weight"),
    "norm": one("d", "transformer.ln_f.weight"),
    "norm.bias": one("d", "transformer.ln_f.bias"),
    "{i}.attn_norm": one("d", _LAYER + "ln_1.weight"),
    "{i}.attn_norm.bias": one("d", _LAYER + "ln_1.bias"),
    "{i}.qkv_proj": one("3*d,d", _LAYER + "attn.c_attn.weight", transposed=True),
    "{i}.qkv_proj.bias": one("3*d", _LAYER + "attn.c_attn.bias"),
    "{i}.o_proj": one("d,d", _LAYER + "attn.c_proj.weight", transposed=True),
    "{i}.o_proj.bias": one("d", _LAYER + "attn.c_proj.bias"),
    "{i}.mlp_norm": one("d", _LAYER + "ln_2.weight"),
    "{i}.mlp_norm.bias": one("d", _LAYER + "ln_2.bias"),
    "{i}.up_proj": one("f,d", _LAYER + "mlp.c_fc.weight", transposed=True),
    "{i}.up_proj.bias": one("f", _LAYER + "mlp.c_fc.bias"),
    "{i}.down_proj": one("d,f", _LAYER + "mlp.c_proj.weight", transposed=True),
    "{i}.down_proj.bias": one("d", _LAYER + "mlp.c_proj.bias"),
}

FAMILY = Family(
    "GPT2LMHeadModel",
    "gpt2",
    _WEIGHTS,
    {
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("n_embd", REQUIRED),
        "intermediate_size": ("n_inner", None),
        "num_layers": ("n_layer", REQUIRED),
        "num_heads": ("n_head", REQUIRED),
        "eps": ("layer_norm_epsilon", 1e-5),
        "context": ("n_positions", 1024),
        "activation": ("activation_function", "gelu_new"),
    },
    activations=GELU,
    embed="embedding_pos",
    norm="layer_norm",
    rotary=False,
    prefix="transformer.",
    neutral={"scale_attn_weights": (None, True), "scale_attn_by_inverse_layer_idx": OFF},
    ignored=("n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn", "summary_*"),
    tied=True,
)
