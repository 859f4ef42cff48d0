"""Granite 4 without experts and without Mamba layers: Granite 3 whose MLP has the names of a shared expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import Family, Rotations, Windows, fields, one
from .granite import GRANITE_NUMBERS
from .layout import LAYER, LLAMA

__all__ = ["FAMILY"]

_WEIGHTS = {
    **LLAMA,
    "{i}.gate_up_proj": one("2*f,d", LAYER + "shared_mlp.input_linear.weight"),
    "{i}.down_proj": one("d,f", LAYER + "shared_mlp.output_linear.weight"),
}


def _rotations(raw: Mapping[str, Any], windows: Sequence[int]) -> list[str | None]:
    return ["" if raw.get("position_embedding_type") == "rope" else None] * len(windows)


FAMILY = Family(
    "GraniteMoeHybridForCausalLM",
    "granitemoehybrid",
    _WEIGHTS,
    {**fields(), "intermediate_size": ("shared_intermediate_size", 1024)},
    windows=Windows(("layer_types",), lambda raw, layers: [0 for _ in raw["layer_types"]]),  # absent: all are Mamba's
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    numbers=GRANITE_NUMBERS,
    rotations=Rotations(("position_embedding_type",), _rotations),
    neutral={"num_local_experts": (0,)},
    ignored=(
        "intermediate_size",
        "mamba_*",
        "num_experts_per_tok",
        "time_step_limit",
        "normalization_function",
        "init_method",
    ),
)
