"""MiniMax-M2: experts in every layer, chosen by sigmoids with a correction; norms over all queries and all keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import OFF, ONE_ROTATION, Family, Router, fields
from .experts import correction, expert_weights, mlp_where_dense, sparse_where
from .layout import LLAMA, WIDE_NORMS

__all__ = ["FAMILY"]

_HEAD_DIM = 128


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Published files say how many elements of a head rotate, and not which part of it."""
    settings = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if (size := raw.get("rotary_dim")) is not None:
        part = size / raw.get("head_dim", _HEAD_DIM)
        settings.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", part))
    return {"": settings}


def _has_experts(raw: Mapping[str, Any], layer: int) -> bool:
    """Every layer has them. A layer's type may be 1 alone, attention: others are those of MiniMax-01."""
    if (types := raw.get("attn_type_list")) and types[layer] != 1:
        raise ValueError
    return True


# Sizes of layers that MiniMax-01 has; noise of training; further tokens, whose layers published files leave out.
_IGNORED = (
    "mlp_intermediate_size", "shared_moe_mode", "layernorm_linear_attention_beta", "router_jitter_noise",
    "use_mtp", "num_mtp_modules", "mtp_transformer_layers",
)  # fmt: skip

FAMILY = Family(
    "MiniMaxM2ForCausalLM",
    "minimax_m2",
    {
        **mlp_where_dense(LLAMA),
        **WIDE_NORMS,
        **expert_weights("block_sparse_moe", ("w1", "w3", "w2")),
        **correction("block_sparse_moe.e_score_correction_bias"),
    },
    {
        **fields(intermediate_size=1536, num_key_value_heads=8, head_dim=_HEAD_DIM, max_position_embeddings=196608),
        "experts": ("num_local_experts", 256),
        "experts_per_token": ("num_experts_per_tok", 8),
        "expert_size": ("intermediate_size", 1536),
    },
    kinds=sparse_where(("attn_type_list",), _has_experts),
    partial_rotary=True,
    rotations=replace(ONE_ROTATION, reads=("rotary_dim",), settings=_rope, defaults={"rope_theta": 5e6}),
    neutral={
        "attention_bias": OFF,
        "mlp_bias": OFF,
        "scoring_func": (None, "sigmoid"),
        "use_routing_bias": (None, True),
        "routed_scaling_factor": (None, 1, 1.0),
        "shared_intermediate_size": (None, 0),
        "use_qk_norm": (None, True),
        "qk_norm_type": (None, "per_layer"),
        "layernorm_full_attention_beta": (None, 1, 1.0),
        "layernorm_mlp_beta": (None, 1, 1.0),
    },
    ignored=_IGNORED,
    router=Router(settings={"sigmoid": 1}),
    aliases={"num_experts": "num_local_experts"},
)
