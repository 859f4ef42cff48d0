"""Hunyuan's dense models: heads are normalised behind their rotation, whose base a fixed alpha stretches."""

from __future__ import annotations

from ..family import OFF, Family, fields, one
from .layout import LAYER, LLAMA

__all__ = ["FAMILY"]

_WEIGHTS = {
    **LLAMA,
    "{i}.q_norm": one("D", LAYER + "self_attn.query_layernorm.weight"),
    "{i}.k_norm": one("D", LAYER + "self_attn.key_layernorm.weight"),
}

FAMILY = Family(
    "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_dense",
    _WEIGHTS,
    fields(rms_norm_eps=1e-5),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm_after_rope": True},
    rope_types=("default", "ntk_alpha"),
    rope_aliases={"dynamic": "ntk_alpha"},
    neutral={
        "use_qk_norm": (None, True),
        "use_cla": OFF,
        "mlp_bias": OFF,
        "norm_type": (None, "rms"),
        "use_rotary_pos_emb": (None, True),
    },
    ignored=("attention_head_dim", "cla_share_factor", "org_vocab_size", "pad_id"),
)
