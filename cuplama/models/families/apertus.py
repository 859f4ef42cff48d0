"""Apertus: normalised heads and an MLP of xIELU, without a gate, with two numbers of its own in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def _settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config that says nothing about scaling means that of Llama 3.1."""
    return {"": raw.get("rope_scaling") or raw.get("rope_parameters") or _LLAMA3}


FAMILY = Family(
    "ApertusForCausalLM",
    "apertus",
    _WEIGHTS,
    fields(rms_norm_eps=1e-5, hidden_act="xielu", max_position_embeddings=65536),
    activations={"xielu": "xielu"},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    rotations=replace(ONE_ROTATION, settings=_settings, defaults={"rope_theta": 12000000.0}),
    neutral={"mlp_bias": OFF, "post_norm": OFF, "qk_norm": (None, True)},
)
