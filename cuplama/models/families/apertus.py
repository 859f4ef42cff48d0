"""Apertus: normalised heads and an MLP of xIELU, without a gate, with two numbers of its own in every layer."""

from __future__ import annotations

from dataclasses import replace

from ..family import OFF, ONE_ROTATION, Family, fields, one
from .layout import LAYER, UNGATED

__all__ = ["FAMILY"]

_WEIGHTS = {
    **UNGATED,
    "{i}.attn_norm": one("d", LAYER + "attention_layernorm.weight"),
    "{i}.mlp_norm": one("d", LAYER + "feedforward_layernorm.weight"),
    "{i}.q_norm": one("D", LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one("D", LAYER + "self_attn.k_norm.weight"),
    "{i}.act.alpha_p": one("1", LAYER + "mlp.act_fn.alpha_p"),
    "{i}.act.alpha_n": one("1", LAYER + "mlp.act_fn.alpha_n"),
}

FAMILY = Family(
    "ApertusForCausalLM",
    "apertus",
    _WEIGHTS,
    fields(rms_norm_eps=1e-5, hidden_act="xielu", max_position_embeddings=65536),
    activations={"xielu": "xielu"},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    rotations=replace(ONE_ROTATION, defaults={"rope_theta": 12000000.0}),
    neutral={"mlp_bias": OFF, "post_norm": OFF, "qk_norm": (None, True)},
)
