"""The model families, as data: op names, config fields with their defaults, and weight recipes.

A family is a row of ``FAMILIES``. Adding one means adding a row: nothing else in the package knows a family by name.
The defaults are those of transformers for a config that leaves the field out (tests/golden/README.md lists them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "HARMLESS_TENSORS", "NEUTRAL", "REQUIRED", "Family", "Recipe"]

REQUIRED = object()


@dataclass(frozen=True)
class Recipe:
    """How a canonical weight is made of checkpoint tensors.

    parts: (shape, tensor name) of each tensor, stacked along the first axis; shapes are dim expressions over
    V (vocabulary), d (hidden), f (feed-forward), P (learned positions), heads, kv_heads and D (head_dim), as the
    *canonical* weight has them. transposed: the checkpoint stores the transpose (GPT-2's Conv1D). otherwise: a name to
    try when the first part's is not there, unless the config says that head and embedding are not tied. when: the
    config flag under which the weight exists.
    """

    parts: tuple[tuple[str, str], ...]
    transposed: bool = False
    otherwise: str | None = None
    when: str | None = None


def _one(shape: str, name: str, **options: Any) -> Recipe:
    return Recipe(((shape, name),), **options)


_L = "model.layers.{i}."
_Q, _KV = "heads*D", "kv_heads*D"

_EMBED_AND_HEAD = {
    # A tied matrix may be stored under either name; if both are stored, both count.
    "embed": _one("V,d", "model.embed_tokens.weight", otherwise="lm_head.weight"),
    "head": _one("V,d", "lm_head.weight", otherwise="model.embed_tokens.weight"),
    "norm": _one("d", "model.norm.weight"),
    "{i}.attn_norm": _one("d", _L + "input_layernorm.weight"),
    "{i}.mlp_norm": _one("d", _L + "post_attention_layernorm.weight"),
    "{i}.o": _one(f"d,{_Q}", _L + "self_attn.o_proj.weight"),
    "{i}.down": _one("d,f", _L + "mlp.down_proj.weight"),
}

_LLAMA = {
    **_EMBED_AND_HEAD,
    "{i}.qkv": Recipe(
        tuple((f"{rows},d", f"{_L}self_attn.{x}_proj.weight") for x, rows in (("q", _Q), ("k", _KV), ("v", _KV)))
    ),
    "{i}.qkv.bias": Recipe(
        tuple((rows, f"{_L}self_attn.{x}_proj.bias") for x, rows in (("q", _Q), ("k", _KV), ("v", _KV))),
        when="qkv_bias",
    ),
    "{i}.o.bias": _one("d", _L + "self_attn.o_proj.bias", when="o_bias"),
    "{i}.up": Recipe((("f,d", _L + "mlp.gate_proj.weight"), ("f,d", _L + "mlp.up_proj.weight"))),
    "{i}.up.bias": Recipe((("f", _L + "mlp.gate_proj.bias"), ("f", _L + "mlp.up_proj.bias")), when="mlp_bias"),
    "{i}.down.bias": _one("d", _L + "mlp.down_proj.bias", when="mlp_bias"),
}

_QWEN3 = {
    **_LLAMA,
    "{i}.q_norm": _one("D", _L + "self_attn.q_norm.weight"),
    "{i}.k_norm": _one("D", _L + "self_attn.k_norm.weight"),
}

_PHI3 = {
    **_EMBED_AND_HEAD,
    "{i}.qkv": _one(f"{_Q}+2*{_KV},d", _L + "self_attn.qkv_proj.weight"),
    "{i}.up": _one("2*f,d", _L + "mlp.gate_up_proj.weight"),
}

_H = "transformer.h.{i}."
_GPT2 = {
    "embed": _one("V,d", "transformer.wte.weight", otherwise="lm_head.weight"),
    "head": _one("V,d", "lm_head.weight", otherwise="transformer.wte.weight"),
    "positions": _one("P,d", "transformer.wpe.weight"),
    "norm": _one("d", "transformer.ln_f.weight"),
    "norm.bias": _one("d", "transformer.ln_f.bias"),
    "{i}.attn_norm": _one("d", _H + "ln_1.weight"),
    "{i}.attn_norm.bias": _one("d", _H + "ln_1.bias"),
    "{i}.qkv": _one("3*d,d", _H + "attn.c_attn.weight", transposed=True),
    "{i}.qkv.bias": _one("3*d", _H + "attn.c_attn.bias"),
    "{i}.o": _one("d,d", _H + "attn.c_proj.weight", transposed=True),
    "{i}.o.bias": _one("d", _H + "attn.c_proj.bias"),
    "{i}.mlp_norm": _one("d", _H + "ln_2.weight"),
    "{i}.mlp_norm.bias": _one("d", _H + "ln_2.bias"),
    "{i}.up": _one("f,d", _H + "mlp.c_fc.weight", transposed=True),
    "{i}.up.bias": _one("f", _H + "mlp.c_fc.bias"),
    "{i}.down": _one("d,f", _H + "mlp.c_proj.weight", transposed=True),
    "{i}.down.bias": _one("d", _H + "mlp.c_proj.bias"),
}

# Tensors that old exporters left in their files and that hold nothing to load.
HARMLESS_TENSORS = (
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)

_SILU = {"silu": "silu_mul", "swish": "silu_mul"}
_GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
}


def _no_window(raw: Mapping[str, Any], layers: int) -> list[int]:
    return [0] * layers


def _window_everywhere(absent: int | None) -> Callable[[Mapping[str, Any], int], list[int]]:
    return lambda raw, layers: [raw.get("sliding_window", absent) or 0] * layers


def _window_by_layer(raw: Mapping[str, Any], layers: int) -> list[int]:
    """Qwen: the layers that ``layer_types`` names, or those from ``max_window_layers`` on, if the window is on."""
    window = raw.get("sliding_window", 4096) or 0 if raw.get("use_sliding_window", False) else 0
    types = raw.get("layer_types")
    first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
    return [window if (types[i] == "sliding_attention" if types else i >= first) else 0 for i in range(layers)]


@dataclass(frozen=True)
class Family:
    """One architecture. ``fields`` maps a quantity to its config field and the default of an absent one."""

    model_type: str
    weights: Mapping[str, Recipe]
    fields: Mapping[str, tuple[str, Any]]
    activations: Mapping[str, str] = field(default_factory=lambda: _SILU)
    embed: str = "embedding"
    norm: str = "rms_norm"
    rotate: str | None = "rope"
    prefix: str = "model."  # bare exports leave it out of the tensor names
    windows: Callable[[Mapping[str, Any], int], list[int]] = _no_window
    flags: Mapping[str, str | bool] = field(default_factory=dict)  # weight flag -> config field, or a constant
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: bool = False
    original_context: int | None = None  # original_max_position_embeddings, where the family has a default of its own
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _fields(**changes: Any) -> dict[str, tuple[str, Any]]:
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
    names = ("vocab", "hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "eps", "context", "activation")
    return {name: (key, defaults[key]) for name, key in zip(names, list(defaults)[:10], strict=True)}


_OFF = (None, False)

# Fields that would change the mathematics, with the values under which they do not. Anything else is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "attention_sinks": _OFF,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "clip_qkv": (None,),
    "use_qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "alibi": _OFF,
    "lm_head_bias": _OFF,
    "rope_interleaved": _OFF,
    "is_causal": (None, True),
    "use_bidirectional_attention": _OFF,
    "per_layer_config": (None,),
    "num_nextn_predict_layers": (None, 0),
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        _LLAMA,
        _fields(),
        flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        neutral={"sliding_window": (None,), "use_sliding_window": _OFF},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        _LLAMA,
        _fields(num_key_value_heads=8, max_position_embeddings=131072),
        windows=_window_everywhere(4096),
        neutral={"attention_bias": _OFF, "mlp_bias": _OFF},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        _LLAMA,
        _fields(num_key_value_heads=32, max_position_embeddings=32768),
        windows=_window_by_layer,
        flags={"qkv_bias": True},
        neutral={"mlp_bias": _OFF},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        _QWEN3,
        _fields(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
        windows=_window_by_layer,
        flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        neutral={"mlp_bias": _OFF},
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        _PHI3,
        _fields(rms_norm_eps=1e-5, max_position_embeddings=4096),
        windows=_window_everywhere(None),
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        partial_rotary=True,
        original_context=4096,
        neutral={
            "attention_bias": _OFF,
            "mlp_bias": _OFF,
            "full_attn_mod": (None, 1),
            "interpolate_factor": (None, 1),
        },
    ),
    "GPT2LMHeadModel": Family(
        "gpt2",
        _GPT2,
        {
            "vocab": ("vocab_size", REQUIRED),
            "hidden": ("n_embd", REQUIRED),
            "ffn": ("n_inner", None),
            "layers": ("n_layer", REQUIRED),
            "heads": ("n_head", REQUIRED),
            "eps": ("layer_norm_epsilon", 1e-5),
            "context": ("n_positions", 1024),
            "activation": ("activation_function", "gelu_new"),
        },
        activations=_GELU,
        embed="embedding_pos",
        norm="layer_norm",
        rotate=None,
        prefix="transformer.",
        neutral={"scale_attn_weights": (None, True), "scale_attn_by_inverse_layer_idx": _OFF},
    ),
}
