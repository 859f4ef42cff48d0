"""What a model family is: the names of its ops, its config fields with their defaults, and its weight recipes.

The defaults are those of transformers for a config that leaves the field out (tests/golden/README.md lists them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "GELU",
    "HARMLESS_TENSORS",
    "NEUTRAL",
    "OFF",
    "REQUIRED",
    "SILU",
    "Family",
    "Recipe",
    "fields",
    "no_window",
    "one",
    "window_by_layer",
    "window_everywhere",
]

REQUIRED = object()


@dataclass(frozen=True)
class Recipe:
    """How a canonical weight is made of checkpoint tensors.

    parts: (shape, tensor name) of each tensor, stacked along the first axis; shapes are dim expressions over
    V (vocabulary), d (hidden), f (feed-forward), P (learned positions), num_heads, num_kv_heads and D (head_dim), as the
    *canonical* weight has them. transposed: the checkpoint stores the transpose (GPT-2's Conv1D). otherwise: a name to
    try when the first part's is not there, unless the config says that head and embedding are not tied. when: the
    config flag under which the weight exists.
    """

    parts: tuple[tuple[str, str], ...]
    transposed: bool = False
    otherwise: str | None = None
    when: str | None = None


def one(shape: str, name: str, **options: Any) -> Recipe:
    return Recipe(((shape, name),), **options)


# Tensors that old exporters left in their files and that hold nothing to load.
HARMLESS_TENSORS = (
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)

SILU = {"silu": "silu_mul", "swish": "silu_mul"}
GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
}


def no_window(raw: Mapping[str, Any], layers: int) -> list[int]:
    return [0] * layers


def window_everywhere(absent: int | None) -> Callable[[Mapping[str, Any], int], list[int]]:
    return lambda raw, layers: [raw.get("sliding_window", absent) or 0] * layers


def window_by_layer(raw: Mapping[str, Any], layers: int) -> list[int]:
    """Qwen: the layers that ``layer_types`` names, or those from ``max_window_layers`` on, if the window is on."""
    window = raw.get("sliding_window", 4096) or 0 if raw.get("use_sliding_window", False) else 0
    types = raw.get("layer_types")
    first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
    return [window if (types[i] == "sliding_attention" if types else i >= first) else 0 for i in range(layers)]


@dataclass(frozen=True)
class Family:
    """One architecture, by the name that config.json has for it. ``fields`` maps a quantity to its config field and the default of an absent one."""

    architecture: str
    model_type: str
    weights: Mapping[str, Recipe]
    fields: Mapping[str, tuple[str, Any]]
    activations: Mapping[str, str] = field(default_factory=lambda: SILU)
    embed: str = "embedding"
    norm: str = "rms_norm"
    rotary: bool = True
    prefix: str = "model."  # bare exports leave it out of the tensor names
    windows: Callable[[Mapping[str, Any], int], list[int]] = no_window
    flags: Mapping[str, str | bool] = field(default_factory=dict)  # weight flag -> config field, or a constant
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: bool = False
    original_context: int | None = None  # original_max_position_embeddings, where the family has a default of its own
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def fields(**changes: Any) -> dict[str, tuple[str, Any]]:
    defaults: dict[str, Any] = {
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        **changes,
    }
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "eps",
        "context",
        "activation",
    )
    return {name: (key, defaults[key]) for name, key in zip(names, list(defaults)[:10], strict=True)}


OFF = (None, False)
# Fields that would change the mathematics, with the values under which they do not. Anything else is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "attention_sinks": OFF,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "clip_qkv": (None,),
    "use_qk_norm": OFF,
    "qk_layernorm": OFF,
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "alibi": OFF,
    "lm_head_bias": OFF,
    "rope_interleaved": OFF,
    "is_causal": (None, True),
    "use_bidirectional_attention": OFF,
    "per_layer_config": (None,),
    "num_nextn_predict_layers": (None, 0),
}
