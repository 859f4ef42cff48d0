"""Golden models as GGUF files: names, keys and the order of rows that llama.cpp's conversion gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.models.checkpoint import open_tensors
from cuplama.models.rope import Rope
from tests.gguf_files import Tensor, write_gguf
from tests.tiny import CHARS

__all__ = ["Piece", "convert", "read_safetensors", "write_chars", "write_converted"]

Array = np.ndarray[Any, Any]
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
}
_ENDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@dataclass(frozen=True)
class Piece:
    """A tensor. source: its name in the folder; array: float32, as it lies in a GGUF file; back: from there to what the
    folder has."""

    source: str
    array: Array
    back: Callable[[Array], Array] = lambda x: x


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a file in Hugging Face's layout, float32."""
    return {
        name: tensor.data.astype(np.float32)
        for name, tensor in open_tensors(path.parent).items()
        if isinstance(tensor.data, np.ndarray)
    }


def convert(folder: Path) -> tuple[dict[str, Any], dict[str, Piece]]:
    """(metadata without a tokenizer, tensors by their names) of a folder in Hugging Face's layout."""
    config = json.loads((folder / "config.json").read_text())
    name = _ARCHITECTURES[config["architectures"][0]]
    metadata: dict[str, Any] = {"general.architecture": name}
    extra: dict[str, Piece] = {}
    if name == "gpt2":
        metadata |= _gpt2_keys(config)
    else:
        metadata |= {f"{name}.{key}": value for key, value in _llama_keys(config).items()}
        more, extra = _rope(config, name)
        metadata |= {f"{name}.rope.{key}": value for key, value in more.items()}
    if name == "phi3":
        metadata["phi3.attention.sliding_window"] = config.get("sliding_window") or 0
    tensors = read_safetensors(folder / "model.safetensors")
    return metadata, {**dict(_piece(source, x, config, name) for source, x in tensors.items()), **extra}


def write_converted(folder: Path, path: Path, kind: str = "F32", **changes: Any) -> Path:
    """A folder as a GGUF file whose matrices have a plain type. changes: keys of the metadata, "." written "__"."""
    metadata, pieces = convert(folder)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return write_gguf(path, metadata, {name: _plain(piece.array, kind) for name, piece in pieces.items()})


def write_chars(path: Path, **changes: Any) -> Path:
    """The golden model of 65 characters, with its tokenizer as a byte-level vocabulary without merges."""
    stored = json.loads((CHARS / "tokenizer.json").read_text())
    spelled = {" ": "Ġ", "\n": "Ċ"}
    keys = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": [spelled.get(c, c) for c in stored["model"]["vocab"]],
        "tokenizer__ggml__merges": [],
    }
    return write_converted(CHARS, path, **{**keys, **changes})


def _plain(array: Array, kind: str) -> Tensor:
    import ml_dtypes

    if array.ndim < 2:
        return "F32", array.shape, array
    dtype: Any = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    return kind, array.shape, array.astype(dtype)


def _piece(source: str, x: Array, config: Mapping[str, Any], architecture: str) -> tuple[str, Piece]:
    stem, _, kind = source.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{kind}", Piece(source, x)
    _, _, layer, rest = stem.split(".", 3)
    name = f"blk.{layer}.{_LAYER[rest]}.{kind}"
    if architecture == "gpt2" and rest.split(".")[-1].startswith("c_") and kind == "weight":
        return name, Piece(source, np.ascontiguousarray(x.T), lambda y: np.ascontiguousarray(y.T))
    if architecture == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads"]
        if rest == "self_attn.k_proj":
            heads = config.get("num_key_value_heads", heads)
        half = len(x) // heads // 2
        return name, Piece(source, _turn(x, heads, 2, half), lambda y: _turn(y, heads, half, 2))
    return name, Piece(source, x)


def _turn(x: Array, heads: int, first: int, second: int) -> Array:
    """Rows of a head [first, second] as [second, first]."""
    split = x.reshape(heads, first, second, *x.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(x.shape))


def _gpt2_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gpt2.context_length": config["n_positions"],
        "gpt2.embedding_length": config["n_embd"],
        "gpt2.feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
        "gpt2.block_count": config["n_layer"],
        "gpt2.attention.head_count": config["n_head"],
        "gpt2.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
    }


def _llama_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    if (dim := config.get("head_dim")) is not None:
        found |= {"attention.key_length": dim, "attention.value_length": dim}
    return found


def _rope(config: Mapping[str, Any], architecture: str) -> tuple[dict[str, Any], dict[str, Piece]]:
    """(keys behind "rope.", tensors)."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    context = config["max_position_embeddings"]
    share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    keys: dict[str, Any] = {"freq_base": float(theta)}
    if architecture in ("llama", "phi3"):
        keys["dimension_count"] = int(head * share)
    original = config.get("original_max_position_embeddings", settings.get("original_max_position_embeddings", context))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if architecture == "phi3":
        keys["scaling.original_context_length"] = original
    if kind == "longrope":
        keys["scaling.attn_factor"] = float(np.sqrt(1 + np.log(context / original) / np.log(original)))
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return keys, {name: Piece("", np.array(settings[key], np.float32)) for name, key in names.items()}
    if kind == "llama3":
        values = {k: settings[k] for k in ("factor", "low_freq_factor", "high_freq_factor")}
        plain, _ = Rope("default", theta, head, context, original, {}).frequencies(1)
        scaled, _ = Rope("llama3", theta, head, context, original, values).frequencies(1)
        return keys, {"rope_freqs.weight": Piece("", (plain / scaled).astype(np.float32))}
    if kind in ("linear", "yarn"):
        keys |= {"scaling.type": kind, "scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        keys["scaling.original_context_length"] = original
    return keys, {}
