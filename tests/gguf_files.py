"""GGUF files for tests: written by hand, so that they can be written wrong, and tokenizer.json as their metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.gguf import TENSOR_TYPES

__all__ = ["Raw", "gguf_bytes", "tensor_type", "vocabulary_of", "write_gguf"]

_CODES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}
_NUMBERS = {t.name: number for number, t in TENSOR_TYPES.items()}
_ALIGNMENT = 32
Tensor = tuple[str, Sequence[int], "np.ndarray[Any, Any]"]  # type, shape with rows first, bytes


class Raw(bytes):
    """A value as it is to stand in the file, its type included."""


def tensor_type(name: str) -> int:
    """The number of a tensor's type."""
    return _NUMBERS[name]


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value: Any) -> bytes:
    """A value with its type in front: bool, int (u32), float (f32), str, an array of strings or of numbers."""
    match value:
        case Raw():
            return bytes(value)
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case np.ndarray():
            code = _CODES[f"{value.dtype.kind}{value.dtype.itemsize}"]
            return struct.pack("<IIQ", 9, code, len(value)) + value.tobytes()
        case _:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3) -> bytes:
    """A whole file."""
    keys = b"".join(text(key) + value_bytes(value) for key, value in metadata.items())
    table, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        data += b"\0" * (-len(data) % _ALIGNMENT)
        table += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table += struct.pack("<IQ", tensor_type(kind), len(data))
        data += content.tobytes()
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + keys + table
    return head + b"\0" * (-len(head) % _ALIGNMENT) + data


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors or {}))
    return path


def vocabulary_of(folder: Path, model: str, pre: str) -> dict[str, Any]:
    """The metadata that a conversion makes of a folder's tokenizer.json. model: "gpt2" or "llama"."""
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**stored["model"]["vocab"], **{t["content"]: t["id"] for t in stored["added_tokens"]}}
    size = max(ids.values()) + 1
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], np.full(size, 5, np.int32)
    for token, i in ids.items():
        tokens[i] = token
        kinds[i] = 6 if model == "llama" and token.startswith("<0x") else 1
    for added in stored["added_tokens"]:
        kinds[added["id"]] = 3 if added["special"] else 4
    found: dict[str, Any] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    merges = [pair(m) for m in stored["model"]["merges"]]
    return {**found, **(scores_of(merges, ids, size) if model == "llama" else {"tokenizer.ggml.merges": merges})}


def scores_of(merges: Sequence[str], ids: Mapping[str, int], size: int) -> dict[str, Any]:
    """Scores from which the order of the merges follows: a token's by the first merge that makes it.

    As in Llama's vocabulary runs of blanks share one that is lower than all others.
    """
    scores = np.full(size, -1000.0 - len(merges), np.float32)
    for rank, merge in reversed(list(enumerate(merges))):
        token = merge.replace(" ", "")
        scores[ids[token]] = -1e9 if not token.strip("▁") else -rank
    return {"tokenizer.ggml.scores": scores}


def pair(merge: str | Iterable[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
