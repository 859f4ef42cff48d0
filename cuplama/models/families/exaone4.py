"""EXAONE 4: norms behind attention and MLP alone, normalised heads; with windows, only their layers rotate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import OFF, Family, Rotations, fields, one, window_by_pattern
from .layout import LAYER, LLAMA

__all__ = ["FAMILY"]

_WEIGHTS = {
    **{name: recipe for name, recipe in LLAMA.items() if name not in ("{i}.attn_norm", "{i}.mlp_norm")},
    "{i}.q_norm": one("D", LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one("D", LAYER + "self_attn.k_norm.weight"),
    "{i}.attn_post_norm": one("d", LAYER + "post_attention_layernorm.weight"),
    "{i}.mlp_post_norm": one("d", LAYER + "post_feedforward_layernorm.weight"),
}


def _where_windows_are(raw: Mapping[str, Any], windows: Sequence[int]) -> list[str | None]:
    everywhere = raw.get("sliding_window", 4096) is None
    return ["" if everywhere or window else None for window in windows]


FAMILY = Family(
    "Exaone4ForCausalLM",
    "exaone4",
    _WEIGHTS,
    fields(num_key_value_heads=32, rms_norm_eps=1e-5),
    windows=window_by_pattern(4096, 4),
    rotations=Rotations(("sliding_window",), _where_windows_are),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
)
