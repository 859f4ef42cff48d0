"""SmolLM3: Llama without rotation in every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..family import Family, Rotations, Windows, fields
from .layout import LLAMA

__all__ = ["FAMILY"]

_READS = ("no_rope_layers", "no_rope_layer_interval")


def _rotated(raw: Mapping[str, Any], layers: int) -> list[bool]:
    given = raw.get("no_rope_layers")  # 1 for a layer *with* rotation
    if given is None:
        every = raw.get("no_rope_layer_interval", 4)
        return [(i + 1) % every != 0 for i in range(layers)]
    return [bool(given[i]) for i in range(layers)]


def _windows(raw: Mapping[str, Any], layers: int) -> list[int]:
    """Of the layers that ``layer_types`` names, or of those without rotation, if the window is on."""
    window = raw.get("sliding_window") or 0 if raw.get("use_sliding_window", False) else 0
    types = raw.get("layer_types")
    sliding = [kind == "sliding_attention" for kind in types] if types else [not on for on in _rotated(raw, layers)]
    return [window if on else 0 for on in sliding]


def _rotations(raw: Mapping[str, Any], windows: Sequence[int]) -> list[str | None]:
    return ["" if on else None for on in _rotated(raw, len(windows))]


FAMILY = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    LLAMA,
    fields(num_key_value_heads=4, max_position_embeddings=32768),
    windows=Windows(("sliding_window", "use_sliding_window", *_READS), _windows),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    rotations=Rotations(_READS, _rotations, defaults={"rope_theta": 2e6}),
    ignored=("max_window_layers",),
    tied=True,
)
