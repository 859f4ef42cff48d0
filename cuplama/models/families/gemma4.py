"""Gemma 4: two sizes of heads, shared keys and values, embeddings for each layer, and experts beside the MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..family import Family, Kinds, Number, Recipe, Rotations, Windows, Wrapper, fields, one
from .gemma import GEMMA
from .layout import HEAD_NORMS, LAYER

__all__ = ["FAMILY"]

# Settings of a layer in ``per_layer_config``, as transformers saves it -> fields of Layer.
_SIZES = {"head_dim": "head_dim", "num_key_value_heads": "num_kv_heads"}
_SHARED, _SAME = "shared_kv", "k_eq_v"  # layers with keys and values of another layer; with one matrix for both


def _windows(raw: Mapping[str, Any], layers: int) -> list[int]:
    """In the layers that ``layer_types`` names, or in five of six; never in the last."""
    window, types = raw.get("sliding_window", 512) or 0, raw.get("layer_types")
    local = [kind == "sliding_attention" for kind in types] if types else [(i + 1) % 6 > 0 for i in range(layers)]
    return [window * here for here in (*local[:-1], False)]


def _kinds(raw: Mapping[str, Any], windows: Sequence[int]) -> list[dict[str, Any]]:
    """Layers without a window have heads of another size. The last ``num_kv_shared_layers`` attend to the keys and
    values of the last layer before them that has a window, or has none, as they do."""
    shared, heads = raw.get("num_kv_shared_layers") or 0, raw["num_attention_heads"]
    first = len(windows) - shared
    whole = {"head_dim": raw.get("global_head_dim", 512)}
    if raw.get("attention_k_eq_v") and raw.get("num_global_key_value_heads") is not None:
        whole["num_key_value_heads"] = raw["num_global_key_value_heads"]
    by_layer = raw.get("per_layer_config")
    if by_layer is None:
        by_layer = {str(i): whole for i, window in enumerate(windows) if not window}
    found = []
    for i, window in enumerate(windows):
        kind: dict[str, Any] = {_SIZES[key]: value for key, value in by_layer.get(str(i), {}).items()}
        wrong = shared < 0 or any(type(value) is not int or value < 1 for value in kind.values())
        if wrong or heads % kind.get("num_kv_heads", 1):
            raise ValueError
        flags = {_SAME} if raw.get("attention_k_eq_v") and not window else set()
        if i >= first:
            kind["kv_layer"] = max(j for j, other in enumerate(windows[:first]) if (other > 0) == (window > 0))
            flags.add(_SHARED)
            if raw.get("use_double_wide_mlp"):
                kind["intermediate_size"] = 2 * raw["intermediate_size"]
        found.append({**kind, "flags": frozenset(flags)})
    return found


def _qkv(recipe: Recipe) -> Recipe:
    """Queries, keys and values, in layers of each kind."""
    q, k, _ = recipe.parts
    return Recipe(
        recipe.parts,
        when=recipe.when,
        instead={_SHARED: Recipe((q,)), _SAME: Recipe((q, k, k))},
    )


_PER_LAYER, _EXPERTS = "per_layer_size", "experts"
_WEIGHTS = {
    **GEMMA,
    **HEAD_NORMS,
    "{i}.qkv_proj": _qkv(GEMMA["{i}.qkv_proj"]),
    "{i}.qkv_proj.bias": _qkv(GEMMA["{i}.qkv_proj.bias"]),
    "{i}.k_norm": Recipe(HEAD_NORMS["{i}.k_norm"].parts, instead={_SHARED: None}),
    "{i}.layer_scalar": one("1", LAYER + "layer_scalar"),
    "embed_tokens_per_layer": one(
        "per_layer_vocab,num_layers*per_layer_size", "model.embed_tokens_per_layer.weight", when=_PER_LAYER
    ),
    "layer_inputs_proj": one("num_layers*per_layer_size,d", "model.per_layer_model_projection.weight", when=_PER_LAYER),
    "layer_inputs_norm": one("per_layer_size", "model.per_layer_projection_norm.weight", when=_PER_LAYER),
    "{i}.layer_input_gate": one("per_layer_size,d", LAYER + "per_layer_input_gate.weight", when=_PER_LAYER),
    "{i}.layer_input_proj": one("d,per_layer_size", LAYER + "per_layer_projection.weight", when=_PER_LAYER),
    "{i}.layer_input_norm": one("d", LAYER + "post_per_layer_input_norm.weight", when=_PER_LAYER),
    "{i}.dense_post_norm": one("d", LAYER + "post_feedforward_layernorm_1.weight", when=_EXPERTS),
    "{i}.router_norm": one("d", LAYER + "router.scale", when=_EXPERTS),
    "{i}.router": one("E,d", LAYER + "router.proj.weight", when=_EXPERTS),
    "{i}.router.scale": one("E", LAYER + "router.per_expert_scale", when=_EXPERTS, wide=True),
    "{i}.experts_norm": one("d", LAYER + "pre_feedforward_layernorm_2.weight", when=_EXPERTS),
    "{i}.experts.gate_up_proj": one("2*e,d", LAYER + "experts.gate_up_proj", when=_EXPERTS, experts=True),
    "{i}.experts.down_proj": one("d,e", LAYER + "experts.down_proj", when=_EXPERTS, experts=True),
    "{i}.experts_post_norm": one("d", LAYER + "post_feedforward_layernorm_2.weight", when=_EXPERTS),
}

_ROTATIONS = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

FAMILY = Family(
    "Gemma4ForCausalLM",
    "gemma4_text",
    _WEIGHTS,
    {
        **fields(num_key_value_heads=4, head_dim=256, max_position_embeddings=131072),
        "activation": ("hidden_activation", "gelu_pytorch_tanh"),
        "per_layer_size": ("hidden_size_per_layer_input", 256),
        "per_layer_vocab": ("vocab_size_per_layer_input", 262144),
        "experts": ("num_experts", None),
        "experts_per_token": ("top_k_experts", None),
        "expert_size": ("moe_intermediate_size", None),
    },
    activations={"gelu_pytorch_tanh": "gelu_tanh_mul"},
    windows=Windows(("sliding_window",), _windows),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "v_norm": True, _EXPERTS: "enable_moe_block"},
    rope_types=("default", "linear", "llama3", "yarn", "proportional"),
    tied=True,
    rotations=Rotations(
        ("layer_types",),
        lambda raw, windows: ["sliding_attention" if window else "full_attention" for window in windows],
        lambda raw: raw.get("rope_parameters") or _ROTATIONS,
    ),
    kinds=Kinds(
        (
            "num_kv_shared_layers", "attention_k_eq_v", "global_head_dim", "num_global_key_value_heads",
            "per_layer_config", "use_double_wide_mlp",
        ),
        _kinds,
    ),
    numbers={
        "embedding_scale": Number("hidden_size", make=math.sqrt),
        "attention_scale": Number(None, 1.0),
        "logits_cap": Number("final_logit_softcapping", None),
        "router_scale": Number("hidden_size", make=lambda size: float(size**-0.5)),
    },
    # With "vision" only the tokens of pictures see what comes after them.
    neutral={"use_bidirectional_attention": ("vision", None)},
    ignored=("hidden_act", "cache_implementation"),
    wrappers=(
        Wrapper(
            ("Gemma4ForConditionalGeneration",),
            "gemma4",
            ("model.language_model.",),
            ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
        ),
    ),
)  # fmt: skip
