"""OLMo 3: OLMo 2 with a window in three layers of four, whose rotation is not scaled."""

from __future__ import annotations

from ..family import OFF, Family, fields, window_by_pattern
from .mixed import rotation_by_window
from .olmo2 import OLMO

__all__ = ["FAMILY"]


FAMILY = Family(
    "Olmo3ForCausalLM",
    "olmo3",
    OLMO,
    fields(rms_norm_eps=1e-5),
    windows=window_by_pattern(4096, 4),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    neutral={"mlp_bias": OFF},
    rotations=rotation_by_window(5e5, 5e5),
)
