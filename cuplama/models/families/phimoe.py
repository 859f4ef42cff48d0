"""Phi-3.5-MoE: Llama with LayerNorm and biases, and experts whose weights come of a sparse mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import OFF, ONE_ROTATION, Family, Number, Router, fields, one, window_everywhere
from .experts import ALL_SPARSE, expert_weights, mlp_where_dense
from .layout import LLAMA, NORM_BIASES

__all__ = ["FAMILY"]


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The factors on cos and sin, of short and of long sequences, are called mscale, and must be the same."""
    settings = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    short, long = (settings.pop(name, None) for name in ("short_mscale", "long_mscale"))
    if short != long:
        raise ValueError
    return {"": settings if short is None else {**settings, "attention_factor": short}}


FAMILY = Family(
    "PhiMoEForCausalLM",
    "phimoe",
    {
        **mlp_where_dense(LLAMA),
        **NORM_BIASES,
        **expert_weights("block_sparse_moe", ("w1", "w3", "w2")),
        "lm_head.bias": one("V", "lm_head.bias", when="head_bias"),
    },
    {
        **fields(intermediate_size=6400, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072),
        "experts": ("num_local_experts", 16),
        "experts_per_token": ("num_experts_per_tok", 2),
        "expert_size": ("intermediate_size", 6400),
    },
    norm="layer_norm",
    windows=window_everywhere(None),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "head_bias": "lm_head_bias"},
    kinds=ALL_SPARSE,
    rope_types=("default", "longrope"),
    rotations=replace(ONE_ROTATION, settings=_rope, defaults={"rope_theta": 1e6}),
    neutral={"mlp_bias": OFF},
    ignored=("input_jitter_noise",),  # noise of training
    router=Router("route_sparsemixer", {"threshold": Number("router_jitter_noise", 0.01, lambda noise: 2 * noise)}),
    aliases={"num_experts": "num_local_experts"},
)
