"""EXAONE 4: norms behind attention and MLP alone, normalised heads; with windows, only their layers rotate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import OFF, Family, Rotations, fields, one
from .layout import LAYER, OLMO
from .mixed import window_but_every

__all__ = ["FAMILY"]

_WEIGHTS = {
    **OLMO,
    "{i}.q_norm": one("D", LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one("D", LAYER + "self_attn.k_norm.weight"),
}


def _where_windows_are(raw: Mapping[str, Any], windows: Sequence[int]) -> list[str | None]:
    everywhere = raw.get("sliding_window", 4096) is None
    return ["" if everywhere or window else None for window in windows]


FAMILY = Family(
    "Exaone4ForCausalLM",
    "exaone4",
    _WEIGHTS,
    fields(num_key_value_heads=32, rms_norm_eps=1e-5),
    windows=window_but_every(4, key="sliding_window_pattern"),
    rotations=Rotations(("sliding_window",), _where_windows_are),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
)
