"""What ``cuplama info`` says of a model, from its config and file headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .checkpoint import load_weights
from .config import ModelConfig, load_config, read_json
from .model import DEFAULT_CONTEXT, stop_tokens
from .tokenizer import Tokenizer

__all__ = ["describe"]

_PARTS = {"embed": "embedding", "positions": "embedding", "head": "head"}


def describe(folder: Path) -> dict[str, Any]:
    """Facts about the model in ``folder``, name -> value, in the order to show them."""
    config = load_config(folder)
    weights = load_weights(folder, config)
    unique = {w.source: (name, w) for name, w in reversed(weights.items())}
    parameters = sum(math.prod(w.shape) for _, w in unique.values())
    memory: dict[str, int] = {}
    for name, w in unique.values():
        part = _PARTS.get(name, "attention" if _is_attention(name) else "norms" if "norm" in name else "feed-forward")
        memory[part] = memory.get(part, 0) + w.nbytes
    dtypes = sorted({w.dtype.name for w in weights.values()})
    item = max(w.dtype.itemsize for w in weights.values())
    per_token = 2 * config.layers * config.kv_heads * config.head_dim * item
    context = min(config.context, DEFAULT_CONTEXT)
    return {
        "folder": str(folder),
        "architecture": config.architecture,
        "parameters": f"{parameters:,}",
        "layers": config.layers,
        "hidden size": config.hidden,
        "feed-forward size": config.ffn,
        "attention": f"{config.heads} heads, {config.kv_heads} KV heads of {config.head_dim}",
        "positions": _positions(config),
        "context": f"{config.context} tokens"
        + (f" ({context} unless --context asks for more)" if context < config.context else ""),
        "vocabulary": config.vocab,
        "weights": f"{_size(sum(memory.values()))} as {', '.join(dtypes)}"
        + (" (head tied to the embedding)" if weights["head"].source == weights["embed"].source else ""),
        "memory by part": [f"{part} {_size(size)}" for part, size in memory.items()],
        "KV cache": f"{_size(per_token)} per token, {_size(per_token * context)} for {context} tokens",
        "stop tokens": _stop_tokens(folder, config),
    }


def _is_attention(name: str) -> bool:
    return name.split(".")[1:2] in (["qkv"], ["o"])


def _positions(config: ModelConfig) -> str:
    window = {w for w in config.windows if w}
    sliding = f", sliding window of {max(window)} in {sum(map(bool, config.windows))} layers" if window else ""
    if config.rope is None:
        return "learned" + sliding
    partial = f" on {config.rope.dim} of {config.head_dim} dims" if config.rope.dim < config.head_dim else ""
    return f"RoPE ({config.rope.type}, theta {config.rope.theta:g}){partial}{sliding}"


def _stop_tokens(folder: Path, config: ModelConfig) -> list[str]:
    """The stop tokens as the engine uses them, with their text where there is a tokenizer."""
    path = folder / "generation_config.json"
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    ids = sorted(stop_tokens(config, read_json(path) if path.exists() else {}, tokenizer, path))
    return [str(i) if tokenizer is None else f"{i} {tokenizer.token_text(i)!r}" for i in ids]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
