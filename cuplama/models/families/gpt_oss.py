"""gpt-oss: experts with a clamped activation and biases everywhere; attention with sinks, with a window in every second
layer."""

from __future__ import annotations

from ..family import Family, Number, Rotations, fields, one, window_by_pattern
from .experts import ALL_SPARSE
from .layout import LAYER, LLAMA

__all__ = ["FAMILY"]

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_EXPERTS = LAYER + "mlp.experts."
# All experts have one tensor, and the rows of gate and up take turns in it. Plain matrices lie transposed.
_GATE_UP, _DOWN = {"experts": True, "interleaved": True}, {"experts": True}

FAMILY = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    {
        **{
            name: recipe for name, recipe in LLAMA.items() if not name.startswith(("{i}.gate_up_proj", "{i}.down_proj"))
        },
        "{i}.sinks": one("num_heads", LAYER + "self_attn.sinks"),
        "{i}.router": one("E,d", LAYER + "mlp.router.weight"),
        "{i}.router.bias": one("E", LAYER + "mlp.router.bias"),
        "{i}.experts.gate_up_proj": one("2*e,d", _EXPERTS + "gate_up_proj", transposed=True, **_GATE_UP),
        "{i}.experts.gate_up_proj.bias": one("2*e", _EXPERTS + "gate_up_proj_bias", **_GATE_UP),
        "{i}.experts.down_proj": one("d,e", _EXPERTS + "down_proj", transposed=True, **_DOWN),
        "{i}.experts.down_proj.bias": one("d", _EXPERTS + "down_proj_bias", **_DOWN),
    },
    {
        **fields(
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=36,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=201088,
            rms_norm_eps=1e-5,
            max_position_embeddings=131072,
        ),
        "experts": ("num_local_experts", 128),
        "experts_per_token": ("num_experts_per_tok", 4),
        "expert_size": ("intermediate_size", 2880),
    },
    activations={"silu": "clamped_swiglu"},
    windows=window_by_pattern(128, 2),
    flags={"qkv_bias": True, "o_bias": True},
    neutral={"attention_bias": (None, True)},
    ignored=("initial_context_length",),  # what the rotation has as its original context
    rotations=Rotations(
        (),
        lambda raw, windows: [""] * len(windows),
        lambda raw: {"": raw.get("rope_scaling") or raw.get("rope_parameters") or _YARN},
        {"rope_theta": 150000.0},
    ),
    kinds=ALL_SPARSE,
    numbers={"swiglu_alpha": Number("swiglu_alpha", 1.702), "swiglu_limit": Number("swiglu_limit", 7.0)},
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)
