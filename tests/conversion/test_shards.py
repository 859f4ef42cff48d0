"""Safetensors files by their sizes: read by the library that defines the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open

from cuplama.conversion.shards import index_of, make_shards
from cuplama.models.safetensors import tensor_bytes
from cuplama.quant.compressed import TensorSpec

SPECS = {
    "a.weight": TensorSpec("F8_E4M3", (3, 5)),
    "a.weight_scale": TensorSpec("BF16", (3, 1)),
    "b.weight_packed": TensorSpec("I32", (4, 2)),
    "b.weight_shape": TensorSpec("I64", (2,)),
    "c": TensorSpec("F32", (7,)),
}


def test_a_file_is_as_the_library_reads_it(tmp_path: Path) -> None:
    (shard,) = make_shards(SPECS, 10**6)
    assert shard.file == "model.safetensors"
    assert index_of([shard]) is None
    path = tmp_path / shard.file
    data = bytearray(shard.size)
    data[: len(shard.head)] = shard.head
    place = shard.tensors["c"]
    data[place.offset : place.offset + 28] = np.arange(7, dtype=np.float32).tobytes()
    path.write_bytes(data)
    with safe_open(str(path), framework="np") as file:
        assert set(file.keys()) == SPECS.keys()
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("c").tolist() == list(range(7))
        assert {name: tuple(file.get_slice(name).get_shape()) for name in SPECS} == {
            n: s.shape for n, s in SPECS.items()
        }
    for name, place in shard.tensors.items():
        item = tensor_bytes(SPECS[name]) // int(np.prod(SPECS[name].shape))
        assert place.offset % item == 0


def test_files_are_cut_before_they_are_too_long() -> None:
    shards = make_shards(SPECS, 45)
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [sorted(shard.tensors) for shard in shards] == [
        ["a.weight", "a.weight_scale"],
        ["b.weight_packed"],
        ["b.weight_shape", "c"],
    ]
    index = index_of(shards)
    assert index is not None
    assert index["weight_map"].keys() == SPECS.keys()
    assert index["metadata"]["total_size"] == sum(map(tensor_bytes, SPECS.values()))
    assert [len(s.tensors) for s in make_shards(SPECS, 1)] == [1] * 5
