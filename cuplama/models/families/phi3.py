"""Phi-3 and Phi-4-mini: one matrix for q, k, v and one for gate and up; longrope, partial rotary."""

from __future__ import annotations

from ..family import OFF, Family, fields, one, window_everywhere
from .layout import EMBED_AND_HEAD, KV_ROWS, LAYER, Q_ROWS

__all__ = ["FAMILY"]

_WEIGHTS = {
    **EMBED_AND_HEAD,
    "{i}.qkv_proj": one(f"{Q_ROWS}+2*{KV_ROWS},d", LAYER + "self_attn.qkv_proj.weight"),
    "{i}.gate_up_proj": one("2*f,d", LAYER + "mlp.gate_up_proj.weight"),
}

FAMILY = Family(
    "Phi3ForCausalLM",
    "phi3",
    _WEIGHTS,
    fields(rms_norm_eps=1e-5, max_position_embeddings=4096),
    windows=window_everywhere(None),
    rope_types=("default", "longrope"),
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    partial_rotary=True,
    original_context=4096,
    neutral={
        "attention_bias": OFF,
        "mlp_bias": OFF,
        "full_attn_mod": (None, 1),
        "interpolate_factor": (None, 1),
    },
)
