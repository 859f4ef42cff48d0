"""Safetensors files whose sizes are known before anything is written: where each tensor of a model will lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.safetensors import lay_out, tensor_bytes
from ..quant.compressed import TensorSpec

__all__ = ["Place", "Shard", "index_of", "make_shards"]


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
    head, offsets = lay_out(tensors)
    places = {name: Place(tensors[name], file, offset) for name, offset in offsets.items()}
    return Shard(file, head, len(head) + sum(map(tensor_bytes, tensors.values())), places)


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The content of model.safetensors.index.json; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    places = {name: shard.file for shard in shards for name in shard.tensors}
    size = sum(shard.size - len(shard.head) for shard in shards)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
