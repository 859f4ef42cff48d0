"""Phi-1, 1.5 and 2: one LayerNorm for attention and MLP side by side, biases everywhere, part of a head rotates."""

from __future__ import annotations

from dataclasses import replace

from ..family import GELU, OFF, ONE_ROTATION, Family, fields, one
from .layout import LAYER, LLAMA, Q_ROWS

__all__ = ["FAMILY"]

_WEIGHTS = {
    "embed_tokens": LLAMA["embed_tokens"],
    "lm_head": LLAMA["lm_head"],
    "lm_head.bias": one("V", "lm_head.bias"),
    "norm": one("d", "model.final_layernorm.weight"),
    "norm.bias": one("d", "model.final_layernorm.bias"),
    "{i}.attn_norm": one("d", LAYER + "input_layernorm.weight"),
    "{i}.attn_norm.bias": one("d", LAYER + "input_layernorm.bias"),
    "{i}.qkv_proj": LLAMA["{i}.qkv_proj"],
    "{i}.qkv_proj.bias": replace(LLAMA["{i}.qkv_proj.bias"], when=None),
    "{i}.o_proj": one(f"d,{Q_ROWS}", LAYER + "self_attn.dense.weight"),
    "{i}.o_proj.bias": one("d", LAYER + "self_attn.dense.bias"),
    "{i}.up_proj": one("f,d", LAYER + "mlp.fc1.weight"),
    "{i}.up_proj.bias": one("f", LAYER + "mlp.fc1.bias"),
    "{i}.down_proj": one("d,f", LAYER + "mlp.fc2.weight"),
    "{i}.down_proj.bias": one("d", LAYER + "mlp.fc2.bias"),
}

FAMILY = Family(
    "PhiForCausalLM",
    "phi",
    _WEIGHTS,
    {**fields(hidden_act="gelu_new"), "eps": ("layer_norm_eps", 1e-5)},
    activations=GELU,
    norm="layer_norm",
    flags={"parallel": True},
    rotations=replace(ONE_ROTATION, defaults={"partial_rotary_factor": 0.5}),
    partial_rotary=True,
    neutral={"qk_layernorm": OFF},
)
