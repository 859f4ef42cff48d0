"""What ``cuplama info`` says of a model, from its config and file headers alone.

``facts`` is for programs: numbers are numbers, and the names stay. ``view`` makes of it what people read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..dtypes import DTYPES
from ..generation_config import stop_tokens
from ..hub import find_model
from ..loading import DEFAULT_CONTEXT
from ..models.checkpoint import INDEX, load_weights
from ..models.config import ModelConfig, load_config, read_json
from ..models.presets import find_shape, is_shape
from ..text.tokenizer import Tokenizer

__all__ = ["facts", "find_config", "view"]

_PARTS = {"embed_tokens": "embedding", "position_table": "embedding", "lm_head": "head"}


def find_config(model: str | None, offline: bool) -> tuple[Path | None, ModelConfig]:
    """A model's folder and config; no folder for the name of a known shape."""
    if model is not None and is_shape(model):
        return None, find_shape(model)[1]
    folder = find_model(model, offline)
    return folder, load_config(folder)


def facts(folder: Path | None, config: ModelConfig) -> dict[str, Any]:
    """Facts about a model by stable names. Where there are no weights, what they would be by the config."""
    found = folder is not None and (any(folder.glob("*.safetensors")) or (folder / INDEX).exists())
    if folder is not None and found:
        weights = load_weights(folder, config)
        tied = weights["lm_head"].source == weights["embed_tokens"].source
        shapes = {name: w.shape for name, w in weights.items()}
        dtypes = {name: w.dtype for name, w in weights.items()}
    else:
        tied = bool(config.tied)
        shapes = config.weight_shapes()
        dtypes = dict.fromkeys(shapes, DTYPES[config.stored])
    sizes = {name: math.prod(shape) for name, shape in reversed(shapes.items()) if name != "lm_head" or not tied}
    memory: dict[str, int] = {}
    for name, size in sizes.items():
        part = _PARTS.get(name, "attention" if _is_attention(name) else "norms" if "norm" in name else "feed_forward")
        memory[part] = memory.get(part, 0) + size * dtypes[name].itemsize
    rope = next(iter(config.ropes.values()), None)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * max(d.itemsize for d in dtypes.values())
    context = min(config.context, DEFAULT_CONTEXT)
    return {
        "folder": None if folder is None else str(folder),
        "architecture": config.architecture,
        "parameters": sum(sizes.values()),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "feed_forward_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "rope_type": rope and rope.type,
        "rope_theta": rope and rope.theta,
        "rope_size": rope and rope.dim,
        "sliding_window": max(config.windows) or None,
        "sliding_layers": sum(map(bool, config.windows)),
        "context": config.context,
        "default_context": context,
        "vocabulary": config.vocab_size,
        "weights_found": found,
        "weight_bytes": sum(memory.values()),
        "weight_dtypes": sorted({d.name for d in dtypes.values()}),
        "head_tied": tied,
        "bytes_by_part": memory,
        "cache_bytes_per_token": per_token,
        "cache_bytes": per_token * context,
        "stop_tokens": _stop_tokens(folder, config),
    }


def view(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same for people: name -> a value or a list of values."""
    more = f" ({facts['default_context']} unless --context asks for more)"
    tied = " (head tied to the embedding)" if facts["head_tied"] else ""
    size = f"{_size(facts['weight_bytes'])} as {', '.join(facts['weight_dtypes'])}{tied}"
    per_token, context = _size(facts["cache_bytes_per_token"]), facts["default_context"]
    return {
        "folder": facts["folder"] or "none: the published shape of a known model",
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}",
        "layers": facts["layers"],
        "hidden size": facts["hidden_size"],
        "feed-forward size": facts["feed_forward_size"],
        "attention": f"{facts['heads']} heads, {facts['kv_heads']} KV heads of {facts['head_size']}",
        "positions": _positions(facts),
        "context": f"{facts['context']} tokens" + (more if context < facts["context"] else ""),
        "vocabulary": facts["vocabulary"],
        "weights": size if facts["weights_found"] else f"none here; by the config {size}",
        "memory by part": [f"{part.replace('_', '-')} {_size(n)}" for part, n in facts["bytes_by_part"].items()],
        "KV cache": f"{per_token} per token, {_size(facts['cache_bytes'])} for {context} tokens",
        "stop tokens": [
            str(t["id"]) if t["text"] is None else f"{t['id']} {t['text']!r}" for t in facts["stop_tokens"]
        ],
    }


def _is_attention(name: str) -> bool:
    return name.split(".")[1:2] in (["qkv_proj"], ["o_proj"])


def _positions(facts: Mapping[str, Any]) -> str:
    window = facts["sliding_window"]
    sliding = f", sliding window of {window} in {facts['sliding_layers']} layers" if window else ""
    if facts["rope_type"] is None:
        return "learned" + sliding
    size, head = facts["rope_size"], facts["head_size"]
    partial = f" on {size} of {head} dims" if size < head else ""
    return f"RoPE ({facts['rope_type']}, theta {facts['rope_theta']:g}){partial}{sliding}"


def _stop_tokens(folder: Path | None, config: ModelConfig) -> list[dict[str, Any]]:
    """The stop tokens as the engine uses them, with their text where there is a tokenizer."""
    if folder is None:
        return [{"id": i, "text": None} for i in sorted(config.eos)]
    path = folder / "generation_config.json"
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    ids = sorted(stop_tokens(config, read_json(path) if path.exists() else {}, tokenizer, path))
    return [{"id": i, "text": None if tokenizer is None else tokenizer.token_text(i)} for i in ids]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
