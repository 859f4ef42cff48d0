"""Qwen3-Next: the layers of Qwen3.5 with experts, whose inputs of gated delta layers lie key head by key head."""

from __future__ import annotations

from ..family import Family, Recipe, Router, Rows, fields
from .delta import DELTA, DELTA_FIELDS, DELTA_ROTATIONS, DELTA_WINDOWS, GATED, KEYS, VALUES, delta_and
from .experts import expert_weights, mlp_where_dense
from .layout import LAYER
from .qwen2_moe import SHARED_EXPERT
from .qwen3_5 import MTP, QWEN3_5_NEUTRAL
from .qwen3_moe import QWEN_SPARSE

__all__ = ["FAMILY"]

# Of each key head: its query and key, and of its value heads the values, and then z; in the other tensor b, and then a.
_QKVZ, _BA = f"2*{KEYS}+2*{VALUES}", "2*value_heads"
_FIRST = {"q": "0", "k": "key_size", "v": "2*key_size", "z": f"2*key_size+{VALUES}//key_heads"}


def _part(rows: str, tensor: str) -> tuple[str, str]:
    return f"{rows},d", f"{LAYER}linear_attn.in_proj_{tensor}.weight"


_INPUTS = {
    "{i}.delta_in_proj": Recipe(
        (*(_part(rows, "qkvz") for rows in (KEYS, KEYS, VALUES, VALUES)), *(_part("value_heads", "ba"),) * 2),
        rows=(
            *(Rows(_QKVZ, "key_heads", first) for first in _FIRST.values()),
            Rows(_BA, "key_heads"),
            Rows(_BA, "key_heads", "value_heads//key_heads"),
        ),
        only="delta",
    ),
}

FAMILY = Family(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    {**mlp_where_dense(GATED), **_INPUTS, **DELTA, **expert_weights(), **SHARED_EXPERT},
    {
        **fields(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            max_position_embeddings=32768,
        ),
        **DELTA_FIELDS,
        "experts": ("num_experts", 512),
        "experts_per_token": ("num_experts_per_tok", 10),
        "expert_size": ("moe_intermediate_size", 512),
        "shared_size": ("shared_expert_intermediate_size", 512),
    },
    windows=DELTA_WINDOWS,
    rotations=DELTA_ROTATIONS,
    kinds=delta_and(QWEN_SPARSE),
    partial_rotary=True,
    norm_offset=1.0,
    neutral=QWEN3_5_NEUTRAL,
    router=Router(settings={"renormalise": ("norm_topk_prob", True)}),
    aliases={"num_local_experts": "num_experts"},
    left_out=MTP,
)
