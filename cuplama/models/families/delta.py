"""What families with gated delta layers share: which layers these are, and the names of their tensors.

Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464. Attention in the other layers
has an output gate, whose rows lie in the matrix of queries: of each head first its query, then its gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import Kinds, Recipe, Rotations, Rows, Windows, one
from .layout import HEAD_NORMS, KV_ROWS, LAYER, LLAMA, Q_ROWS

__all__ = [
    "DELTA",
    "DELTA_FIELDS",
    "DELTA_KINDS",
    "DELTA_ROTATIONS",
    "DELTA_WINDOWS",
    "GATED",
    "KEYS",
    "VALUES",
    "delta_and",
]

KEYS, VALUES = "key_heads*key_size", "value_heads*value_size"
_LINEAR = "linear_attention"
_DELTA = LAYER + "linear_attn."


def _types(raw: Mapping[str, Any], layers: int) -> Sequence[str]:
    """By name, or every layer but each ``full_attention_interval``-th."""
    interval = raw.get("full_attention_interval", 4)
    types: Sequence[str] = raw.get("layer_types") or [
        _LINEAR if (i + 1) % interval else "full_attention" for i in range(layers)
    ]
    if "full_attention" not in types:
        raise ValueError
    return types


def _kinds(raw: Mapping[str, Any], windows: Sequence[int]) -> list[dict[str, Any]]:
    delta = (kind == _LINEAR for kind in _types(raw, len(windows)))
    return [{"flags": frozenset({"delta"} if here else ())} for here in delta]


DELTA_WINDOWS = Windows((), lambda raw, layers: [0] * layers, (_LINEAR,))
DELTA_KINDS = Kinds(("layer_types", "full_attention_interval"), _kinds)
DELTA_ROTATIONS = Rotations(
    ("layer_types", "full_attention_interval"),
    lambda raw, windows: [None if kind == _LINEAR else "" for kind in _types(raw, len(windows))],
    defaults={"partial_rotary_factor": 0.25},
    harmless=("mrope_section", "mrope_interleaved"),  # a token of text has one position, a picture's has three
)


def delta_and(other: Kinds) -> Kinds:
    """The flags of gated delta layers, and those of another rule."""

    def rule(raw: Mapping[str, Any], windows: Sequence[int]) -> list[dict[str, Any]]:
        both = zip(_kinds(raw, windows), other.rule(raw, windows), strict=True)
        return [{"flags": own["flags"] | more["flags"]} for own, more in both]

    return Kinds((*DELTA_KINDS.reads, *other.reads), rule)


DELTA_FIELDS = {
    "key_heads": ("linear_num_key_heads", 16),
    "value_heads": ("linear_num_value_heads", 32),
    "key_size": ("linear_key_head_dim", 128),
    "value_size": ("linear_value_head_dim", 128),
    "conv_size": ("linear_conv_kernel_dim", 4),
}


def _of_attention(recipe: Recipe) -> Recipe:
    return Recipe(recipe.parts, instead={"delta": None}, rows=recipe.rows)


_HALVES = "2*num_heads*D"  # rows of a tensor that holds queries and gates
_Q = (f"{Q_ROWS},d", LAYER + "self_attn.q_proj.weight")

# Layers with attention, whose output has a gate.
GATED = {
    **LLAMA,
    "{i}.qkv_proj": _of_attention(
        Recipe(
            (_Q, *((f"{KV_ROWS},d", f"{LAYER}self_attn.{x}_proj.weight") for x in "kv")),
            rows=(Rows(_HALVES, "num_heads"), None, None),
        )
    ),
    "{i}.attn_gate_proj": _of_attention(Recipe((_Q,), rows=(Rows(_HALVES, "num_heads", "D"),))),
    "{i}.o_proj": _of_attention(LLAMA["{i}.o_proj"]),
    **{name: _of_attention(recipe) for name, recipe in HEAD_NORMS.items()},
}

# What gated delta layers have in place of attention, but for the matrices that their input is multiplied by.
DELTA = {
    "{i}.delta_conv": one(f"2*{KEYS}+{VALUES},conv_size", _DELTA + "conv1d.weight", only="delta", single=True),
    "{i}.delta_A_log": one("value_heads", _DELTA + "A_log", only="delta", wide=True),
    "{i}.delta_dt_bias": one("value_heads", _DELTA + "dt_bias", only="delta", wide=True),
    "{i}.delta_norm": one("value_size", _DELTA + "norm.weight", only="delta"),
    "{i}.delta_out_proj": one(f"d,{VALUES}", _DELTA + "out_proj.weight", only="delta"),
}
