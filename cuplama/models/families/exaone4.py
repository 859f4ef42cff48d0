"""EXAONE 4: norms behind attention and MLP alone, normalised heads; with windows, only their layers rotate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import OFF, Family, Rotations, fields, window_by_pattern
from .layout import HEAD_NORMS, POST_NORMS

__all__ = ["FAMILY"]


def _where_windows_are(raw: Mapping[str, Any], windows: Sequence[int]) -> list[str | None]:
    everywhere = raw.get("sliding_window", 4096) is None
    return ["" if everywhere or window else None for window in windows]


FAMILY = Family(
    "Exaone4ForCausalLM",
    "exaone4",
    POST_NORMS | HEAD_NORMS,
    fields(num_key_value_heads=32, rms_norm_eps=1e-5),
    windows=window_by_pattern(4096, 4),
    rotations=Rotations(("sliding_window",), _where_windows_are),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
)
