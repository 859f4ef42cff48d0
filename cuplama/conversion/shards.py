"""Safetensors files whose sizes are known before anything is written: where each tensor of a model will lie.

The format is of https://github.com/huggingface/safetensors: the length of a header, the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..quant.compressed import TensorSpec

__all__ = ["ITEM_BYTES", "Place", "Shard", "index_of", "make_shards", "tensor_bytes"]

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's data."""
    return ITEM_BYTES[spec.dtype] * math.prod(spec.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in which file, and from which byte on."""

    spec: TensorSpec
    file: str
    offset: int


@dataclass(frozen=True)
class Shard:
    """A file. head: its first bytes, up to the data; size: bytes in all; tensors: by name."""

    file: str
    head: bytes
    size: int
    tensors: Mapping[str, Place]


def make_shards(tensors: Mapping[str, TensorSpec], limit: int) -> list[Shard]:
    """Files of at most ``limit`` bytes of data, unless a single tensor is longer, for tensors in that order.

    Within a file the widest elements come first, so that every tensor is aligned.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if groups[-1] and size + tensor_bytes(spec) > limit:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += tensor_bytes(spec)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    return [_shard(file, group) for file, group in zip(names, groups, strict=True)]


def _shard(file: str, tensors: Mapping[str, TensorSpec]) -> Shard:
    ordered = sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, offsets = 0, {}
    for name, spec in ordered:
        offsets[name] = at
        end = at + tensor_bytes(spec)
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    places = {name: Place(spec, file, len(head) + offsets[name]) for name, spec in ordered}
    return Shard(file, head, len(head) + at, places)


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The content of model.safetensors.index.json; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    places = {name: shard.file for shard in shards for name in shard.tensors}
    size = sum(shard.size - len(shard.head) for shard in shards)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
