"""Qwen3.5, 3.6 and 3.8 without experts: three of four layers have a gated delta rule, the others gated attention."""

from __future__ import annotations

from ..family import OFF, Family, Recipe, Wrapper, fields
from .delta import DELTA, DELTA_FIELDS, DELTA_KINDS, DELTA_ROTATIONS, DELTA_WINDOWS, GATED, KEYS, VALUES
from .layout import LAYER

__all__ = ["DELTA_INPUTS", "FAMILY", "MTP", "QWEN3_5_IGNORED", "QWEN3_5_NEUTRAL"]

_INPUT = LAYER + "linear_attn.in_proj_"
# Each part has a tensor of its own.
_PARTS = {"qkv": f"2*{KEYS}+{VALUES}", "z": VALUES, "b": "value_heads", "a": "value_heads"}
DELTA_INPUTS = {
    "{i}.delta_in_proj": Recipe(
        tuple((f"{rows},d", f"{_INPUT}{name}.weight") for name, rows in _PARTS.items()), only="delta"
    ),
}
QWEN3_5_NEUTRAL = {
    "attention_bias": OFF,
    "attn_output_gate": (None, True),
    "output_gate_type": (None, "silu", "swish"),
    "use_sliding_window": OFF,
}
# The state is float32 whatever a config says; layers that guess further tokens are left out.
QWEN3_5_IGNORED = ("mamba_ssm_dtype", "mtp_*")
MTP = ("mtp.",)

FAMILY = Family(
    "Qwen3_5ForCausalLM",
    "qwen3_5_text",
    {**GATED, **DELTA_INPUTS, **DELTA},
    {
        **fields(
            vocab_size=248320,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=32,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=256,
            max_position_embeddings=32768,
        ),
        **DELTA_FIELDS,
    },
    windows=DELTA_WINDOWS,
    rotations=DELTA_ROTATIONS,
    kinds=DELTA_KINDS,
    partial_rotary=True,
    norm_offset=1.0,
    neutral={**QWEN3_5_NEUTRAL, "mlp_only_layers": (None, [])},
    ignored=QWEN3_5_IGNORED,
    wrappers=(
        Wrapper(
            ("Qwen3_5ForConditionalGeneration",),
            "qwen3_5",
            ("model.language_model.",),
            ("model.visual.",),
        ),
    ),
    left_out=MTP,
)
