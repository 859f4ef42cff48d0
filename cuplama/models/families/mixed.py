"""The rotations of families that mix layers with a sliding window and layers without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import Rotations

__all__ = ["rotation_by_window"]


def rotation_by_window(theta: float, local_theta: float, local_key: str = "") -> Rotations:
    """One rotation for layers with a window and one for those without, to which alone ``rope_scaling`` applies.

    theta, local_theta: the defaults of ``rope_theta``, for full attention and for windows; local_key: the field of
    the latter in files that have no ``rope_parameters``, if there is one.
    """

    def settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
        given = raw.get("rope_parameters") or {"full_attention": {}, "sliding_attention": {}}
        if not all(isinstance(value, dict | None) for value in given.values()):
            return {}  # one object for all layers, which these families do not have
        whole, local = given.get("full_attention") or {}, given.get("sliding_attention") or {}
        return {
            "full_attention": {"rope_theta": raw.get("rope_theta", theta), **whole, **(raw.get("rope_scaling") or {})},
            "sliding_attention": {"rope_theta": raw.get(local_key, local_theta), **local},
        }

    return Rotations(
        ("layer_types", *([local_key] if local_key else [])),
        lambda raw, windows: ["sliding_attention" if window else "full_attention" for window in windows],
        settings,
    )
