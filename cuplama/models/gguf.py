"""GGUF -> config.json's fields and Hugging Face's tensor names: a row for each architecture.

Names and keys are those that llama.cpp's conversion writes (ggml-org/llama.cpp, gguf-py/gguf/constants.py and
conversion/).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..gguf import GGUF
from ..quant.gguf import GGUF_PLAIN, tensor_data
from ..quant.tensor import Tensor
from ..text.gguf_tokenizer import special_ids, stop_ids
from .gguf_rope import ROPE_TENSORS, decimal, rope_fields

__all__ = ["ARCHITECTURES", "gguf_config", "gguf_generation", "gguf_name", "gguf_tensors"]

_LAYER = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)
_Names = Mapping[str, str]

# Keys behind the architecture's name -> (field of config.json, type). A value may be an array, one for each layer.
_SIZES: Mapping[str, tuple[str, type[Any]]] = {
    "context_length": ("max_position_embeddings", int),
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "block_count": ("num_hidden_layers", int),
    "attention.head_count": ("num_attention_heads", int),
}
_LLAMA_KEYS: Mapping[str, tuple[str, type[Any]]] = {
    **_SIZES,
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "attention.key_length": ("head_dim", int),
}
# What changes the mathematics; config_fields.py says which values do not.
_NEUTRAL: Mapping[str, tuple[str, type[Any]]] = {
    "expert_count": ("num_local_experts", int),
    "expert_used_count": ("num_experts_per_tok", int),
    "attention.scale": ("attention_multiplier", float),
    "attention.causal": ("is_causal", bool),
    "logit_scale": ("logit_scale", float),
    "embedding_scale": ("embedding_multiplier", float),
    "residual_scale": ("residual_multiplier", float),
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}
# Of no effect: how the weights of the first converters lay, the vocabulary's size, which the embedding has, and a key
# that Qwen's own files have though nothing is parallel.
_HARMLESS = ("tensor_data_layout", "vocab_size", "attention.value_length", "use_parallel_residual")
_OPTIONAL = frozenset({"attention.head_count_kv", "attention.key_length", "attention.sliding_window"})

_SAMPLING = "general.sampling."
# Key behind it -> (field of generation_config.json, type).
_SAMPLERS: Mapping[str, tuple[str, Any]] = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_repeat": ("repetition_penalty", float),
}

_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Architecture:
    """What a file of one ``general.architecture`` is in Hugging Face's layout.

    name: the class of config.json; keys: as ``_SIZES``; model: tensor -> tensor; layer: tensor of a layer without its
    ``.weight`` or ``.bias`` -> the same; layers: what a layer's names begin with there; permuted: tensors of a layer
    whose rows lie in the order of another rotation -> the field that counts their heads; transposed: matrices that
    Hugging Face's files have transposed, and these have not; fixed: fields of config.json that no key sets; flags:
    field of config.json -> the tensor whose presence it is; rotary: whether positions are rotations.
    """

    name: str
    keys: Mapping[str, tuple[str, type[Any]]] = field(default_factory=lambda: _LLAMA_KEYS)
    model: _Names = field(default_factory=lambda: _MODEL)
    layer: _Names = field(default_factory=lambda: _LLAMA_LAYER)
    layers: str = "model.layers."
    permuted: _Names = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    rotary: bool = True


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        permuted={"attn_q": "num_heads", "attn_k": "num_kv_heads"},
        flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        layer={**_LLAMA_LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        {**_LLAMA_KEYS, "attention.sliding_window": ("sliding_window", int)},
        layer={**_LLAMA_LAYER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "context_length": ("n_positions", int),
            "embedding_length": ("n_embd", int),
            "feed_forward_length": ("n_inner", int),
            "block_count": ("n_layer", int),
            "attention.head_count": ("n_head", int),
            "attention.layer_norm_epsilon": ("layer_norm_epsilon", float),
        },
        model={
            "token_embd.weight": "transformer.wte.weight",
            "position_embd.weight": "transformer.wpe.weight",
            "output_norm.weight": "transformer.ln_f.weight",
            "output_norm.bias": "transformer.ln_f.bias",
            "output.weight": "lm_head.weight",
        },
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h.",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        fixed={"activation_function": "gelu_new"},
        rotary=False,
    ),
}
"""By ``general.architecture``."""


def gguf_config(gguf: GGUF) -> dict[str, Any]:
    """What config.json would say, from the metadata. Keys that nothing reads are in it under their own names.

    Raises ConfigError and CheckpointError naming the file and the key that is missing, of another type or unsupported.
    """
    name, row = _architecture(gguf)
    prefix = f"{name}."
    raw: dict[str, Any] = {"architectures": [row.name], **row.fixed}
    for key, (ours, kind) in {**row.keys, **_NEUTRAL}.items():
        value = _value(gguf, prefix + key, kind)
        if value is not None:
            raw[ours] = value
        elif key in row.keys and key not in _OPTIONAL:
            raise ConfigError(f"{gguf.path}: {prefix}{key} is missing")
    raw["vocab_size"] = _vocab_size(gguf, prefix)
    read = {prefix + key for key in (*row.keys, *_NEUTRAL, *_HARMLESS)}
    if row.rotary:
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        head_dim = raw.get("head_dim") or (hidden // heads if heads > 0 else 0)
        raw["head_dim"] = head_dim
        values = _value(gguf, f"{prefix}attention.value_length", int)
        if values not in (None, head_dim):
            raise ConfigError(
                f"{gguf.path}: {prefix}attention.value_length is {values}; supported: {head_dim}, as of keys"
            )
        fields, more = rope_fields(gguf, name, head_dim, raw["max_position_embeddings"])
        raw.update(fields)
        read |= more
    if raw.get("sliding_window") == 0:
        raw["sliding_window"] = None
    raw["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    raw.update({flag: tensor in gguf.tensors for flag, tensor in row.flags.items()})
    raw["torch_dtype"] = _dtype(gguf)
    raw["bos_token_id"], raw["eos_token_id"] = special_ids(gguf).get("bos"), stop_ids(gguf)
    raw.update({key: "?" for key in gguf.metadata if key.startswith(prefix) and key not in read})
    return raw


def gguf_tensors(gguf: GGUF, dims: Mapping[str, int]) -> dict[str, Tensor]:
    """The weights by Hugging Face's names; one that has none keeps its own.

    dims: the sizes that ``Architecture.permuted`` names. Raises CheckpointError for a type that is not supported.
    """
    _, row = _architecture(gguf)
    found: dict[str, Tensor] = {}
    for name, tensor in gguf.tensors.items():
        if name in ROPE_TENSORS:
            continue
        other, rows, transposed = row.model.get(name, name), None, False
        if (parts := _LAYER.fullmatch(name)) is not None:
            stem, _, kind = parts[2].rpartition(".")
            if stem in row.layer and kind in ("weight", "bias"):
                other = f"{row.layers}{int(parts[1])}.{row.layer[stem]}.{kind}"
            transposed = stem in row.transposed and kind == "weight"
            if stem in row.permuted:
                rows = _rotation_order(tensor.shape[0], dims[row.permuted[stem]])
        data, shape = tensor_data(tensor, rows), tensor.shape
        if transposed and isinstance(data, np.ndarray):  # a quantised matrix is [out, in] wherever it comes from
            data, shape = data.T, shape[::-1]
        if other in found:
            raise CheckpointError(f"{tensor.file}: tensors {found[other].name} and {name} are the same weight")
        found[other] = Tensor(name, tensor.file, tensor.type.name, shape, data)
    return found


def gguf_name(gguf: GGUF, name: str) -> str:
    """What a tensor of Hugging Face's layout is called in the file."""
    _, row = _architecture(gguf)
    if name in row.model.values():
        return next(ours for ours, theirs in row.model.items() if theirs == name)
    number, _, rest = name.removeprefix(row.layers).partition(".")
    stem, _, kind = rest.rpartition(".")
    return next((f"blk.{number}.{ours}.{kind}" for ours, theirs in row.layer.items() if theirs == stem), name)


def gguf_generation(gguf: GGUF) -> dict[str, Any]:
    """What generation_config.json would say: sampling settings that the file brings. A temperature of 0 is greedy."""
    found: dict[str, Any] = {}
    for key in gguf.metadata:
        if key.startswith(_SAMPLING):
            name, kind = _SAMPLERS.get(key.removeprefix(_SAMPLING), (key, (str, int, float, list, np.ndarray)))
            value = gguf.get(key, kind)
            found[name] = decimal(value) if isinstance(value, float) else value
    if found.get("temperature") == 0:
        return {**found, "do_sample": False, "temperature": None}
    return {**found, "do_sample": True} if found else {}


def _architecture(gguf: GGUF) -> tuple[str, Architecture]:
    name = gguf.get("general.architecture", str)
    if name is None:
        raise ConfigError(f"{gguf.path}: general.architecture is missing; is this a model?")
    if name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{gguf.path}: general.architecture is {name!r:.80}; supported: {supported}")
    return name, ARCHITECTURES[name]


def _value(gguf: GGUF, key: str, kind: type[Any]) -> Any:
    """A value, or the one value of an array that has one for each layer; None for one that is absent."""
    value = gguf.get(key, kind if kind is bool else (kind, np.ndarray))
    if isinstance(value, np.ndarray):
        if kind is int and value.dtype.kind not in "iu":
            raise CheckpointError(f"{gguf.path}: {key} is an array of floats; it must be one of whole numbers")
        distinct = np.unique(value)
        if len(distinct) != 1:
            raise ConfigError(f"{gguf.path}: {key} differs from layer to layer; supported: one value for all")
        value = kind(distinct[0])
    return decimal(value) if kind is float and value is not None else value


def _vocab_size(gguf: GGUF, prefix: str) -> int:
    """The rows of the embedding."""
    table = gguf.tensors.get("token_embd.weight")
    if table is None:
        raise ConfigError(f"{gguf.path}: tensor token_embd.weight is missing")
    return table.shape[0]


def _dtype(gguf: GGUF) -> str:
    """What a model computes in: float16 or float32 if its matrices are stored in it, else bfloat16."""
    types = {t.type.name for t in gguf.tensors.values() if len(t.shape) > 1}
    if not types <= GGUF_PLAIN.keys() or "BF16" in types:
        return "bfloat16"
    return "float16" if "F16" in types else "float32"


def _rotation_order(count: int, heads: int) -> np.ndarray[Any, Any] | None:
    """The place of each row: of a head the file has first and second halves in turns, Hugging Face one after the
    other. None where the rows are no whole heads, which the shape's check will say."""
    if count % (2 * heads):
        return None
    return np.arange(count, dtype=np.int64).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
