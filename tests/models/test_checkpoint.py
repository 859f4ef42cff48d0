"""Safetensors -> weights: what is accepted, under which names, and that nothing is lost or silently ignored."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.errors import CheckpointError, ConfigError
from cuplama.models.checkpoint import INDEX, load_weights, open_tensors
from cuplama.models.config import parse_config
from cuplama.quant.weight import Weight

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 12, "hidden_size": 8, "intermediate_size": 6,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 12,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 5,
}


def save(path: Path, tensors: Mapping[str, Array], **changes: Any) -> None:
    """Write a safetensors file by hand, so that it can be written wrong. changes: header entries to replace."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, x in tensors.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps({**header, **changes}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values()))


def tensors_of(raw: Mapping[str, Any], dtype: Any = np.float32) -> Tensors:
    """All tensors that a model of this config has, with values that tell them apart. A tied head is left out."""
    config = parse_config(raw)
    dims, found, rng = config.dims(), Tensors(), np.random.default_rng(0)
    for recipe in config.recipes().values():
        for shape, name in recipe.parts:
            if name != "lm_head.weight":
                sizes = [int(eval(d, {}, dict(dims))) for d in shape.split(",")]
                found[name] = rng.standard_normal(sizes[::-1] if recipe.transposed else sizes).astype(dtype)
    return found


def load(folder: Path, raw: Mapping[str, Any] = LLAMA) -> dict[str, Weight]:
    return load_weights(folder, parse_config(raw))


@pytest.fixture
def tensors() -> Tensors:
    return tensors_of(LLAMA)


@pytest.fixture
def failure(tmp_path: Path) -> Callable[..., str]:
    """Load the folder and return the one line that the error is."""

    def found(raw: Mapping[str, Any] = LLAMA) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load(tmp_path, raw)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return found


def is_mapped(array: Array) -> bool:
    """Whether the array's memory is that of a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
def test_one_file(dtype: Any, tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA, dtype)
    save(tmp_path / "model.safetensors", tensors)
    weights = load(tmp_path)
    layer = "model.layers.1.self_attn."
    qkv = np.concatenate([tensors[f"{layer}{x}_proj.weight"] for x in "qkv"])
    assert weights["1.qkv_proj"].dtype == dtype
    assert weights["1.qkv_proj"].shape == qkv.shape == (16, 8)
    assert np.array_equal(weights["1.qkv_proj"].array(), qkv)
    assert weights["1.qkv_proj"].nbytes == qkv.nbytes
    assert np.array_equal(weights["embed_tokens"].array(), tensors["model.embed_tokens.weight"])


def test_weights_are_views_of_the_mapped_file(tensors: Tensors, tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", tensors)
    for weight in load(tmp_path).values():
        assert all(isinstance(p, np.ndarray) and is_mapped(p) and not p.flags.writeable for p in weight.parts)
        assert all(is_mapped(piece) for _, piece in weight.chunks(64))
    assert is_mapped(load(tmp_path)["norm"].array())


@pytest.mark.parametrize("raw", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_chunks_make_up_the_weight(raw: Mapping[str, Any], size: int, tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", tensors_of(raw))
    for weight in load(tmp_path, raw).values():
        flat, end = np.full(weight.shape, np.nan, weight.dtype).reshape(-1), 0
        row = weight.nbytes // weight.shape[0]
        for offset, piece in weight.chunks(size):
            assert offset == end
            assert piece.ndim == 1
            assert piece.flags.c_contiguous
            assert piece.nbytes <= max(size, row)
            flat[offset : offset + piece.size] = piece
            end = offset + piece.size
        assert np.array_equal(flat.reshape(weight.shape), weight.array())


def test_gpt2_stores_its_matrices_transposed(tmp_path: Path) -> None:
    tensors = tensors_of(GPT2)
    save(tmp_path / "model.safetensors", tensors)
    weights = load(tmp_path, GPT2)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    assert np.array_equal(weights["0.qkv_proj"].array(), tensors["transformer.h.0.attn.c_attn.weight"].T)


@pytest.mark.parametrize("raw", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_bare_names_without_the_prefix(raw: Mapping[str, Any], tmp_path: Path) -> None:
    tensors = tensors_of(raw)
    prefix = parse_config(raw).family.prefix
    head = {"lm_head.weight": tensors_of(raw)[f"{prefix}{'wte' if raw is GPT2 else 'embed_tokens'}.weight"] + 1}
    save(tmp_path / "model.safetensors", {**{n.removeprefix(prefix): x for n, x in tensors.items()}, **head})
    weights = load(tmp_path, raw)
    assert np.array_equal(weights["lm_head"].array(), head["lm_head.weight"])
    assert np.array_equal(weights["lm_head"].array(), weights["embed_tokens"].array() + 1)


@pytest.mark.parametrize("flag", [True, None])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_under_either_name(name: str, flag: bool | None, tensors: Tensors, tmp_path: Path) -> None:
    matrix = tensors.pop("model.embed_tokens.weight")
    save(tmp_path / "model.safetensors", {**tensors, name: matrix})
    weights = load(tmp_path, {**LLAMA, "tie_word_embeddings": flag})
    assert weights["lm_head"].source == weights["embed_tokens"].source == (name,)  # and so loaded once
    assert np.array_equal(weights["lm_head"].array(), matrix)
    assert np.array_equal(weights["embed_tokens"].array(), matrix)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_lost_head_or_embedding_of_an_untied_model_is_missed(name: str, tensors: Tensors, tmp_path: Path) -> None:
    matrix = tensors.pop("model.embed_tokens.weight")
    save(tmp_path / "model.safetensors", {**tensors, name: matrix})
    (other,) = {"lm_head.weight", "model.embed_tokens.weight"} - {name}
    with pytest.raises(CheckpointError, match=rf"tensor {other} is missing, and config.json says .* not tied"):
        load(tmp_path, {**LLAMA, "tie_word_embeddings": False})


@pytest.mark.parametrize(("raw", "name"), [(LLAMA, "LlamaModel"), (GPT2, "GPT2Model")], ids=["llama", "gpt2"])
def test_an_export_without_a_head(raw: Mapping[str, Any], name: str, tmp_path: Path) -> None:
    """The embedding is the head if config.json says so, or where it says nothing if the family has it so."""
    config = parse_config(raw)
    bare = {"architectures": [name], "model_type": config.family.model_type}
    save(tmp_path / "model.safetensors", {n.removeprefix(config.family.prefix): x for n, x in tensors_of(raw).items()})
    assert load(tmp_path, {**raw, **bare, "tie_word_embeddings": True})["lm_head"].shape == (12, 8)
    if name == "GPT2Model":
        weights = load(tmp_path, {**raw, **bare})
        assert weights["lm_head"].source == weights["embed_tokens"].source
    else:
        with pytest.raises(
            CheckpointError, match=r"lm_head\.weight is missing, .* not tied \(tie_word_embeddings is not"
        ):
            load(tmp_path, {**raw, **bare})


@pytest.mark.parametrize("flag", [True, False])
def test_both_matrices_stored_are_both_used(flag: bool, tensors: Tensors, tmp_path: Path) -> None:
    head = tensors["model.embed_tokens.weight"] + 1
    save(tmp_path / "model.safetensors", {**tensors, "lm_head.weight": head})
    weights = load(tmp_path, {**LLAMA, "tie_word_embeddings": flag})
    assert np.array_equal(weights["lm_head"].array(), head)
    assert np.array_equal(weights["embed_tokens"].array() + 1, head)


def test_harmless_leftovers(tensors: Tensors, tmp_path: Path) -> None:
    extra: Tensors = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32),
        "model.rotary_emb.inv_freq": np.ones(1, np.float64),
    }
    save(tmp_path / "model.safetensors", {**tensors, **extra})
    assert len(load(tmp_path)) == 3 + 2 * 6
    masks: Tensors = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 5, 5), np.uint8),
        "transformer.h.0.attn.masked_bias": np.ones((), np.float32),
    }
    for prefix in ("transformer.", ""):  # the published GPT-2 has bare names, masks included
        found = {n.replace("transformer.", prefix): x for n, x in {**tensors_of(GPT2), **masks}.items()}
        save(tmp_path / "model.safetensors", found)
        assert "0.qkv_proj.bias" in load(tmp_path, GPT2)


def test_missing_tensor(tensors: Tensors, tmp_path: Path, failure: Callable[..., str]) -> None:
    for name in list(tensors):
        save(tmp_path / "model.safetensors", {n: x for n, x in tensors.items() if n != name})
        message = failure()
        assert name in message
        assert str(tmp_path) in message
        assert "is missing" in message


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "language_model."])
def test_names_with_a_prefix_of_their_own(
    prefix: str, tensors: Tensors, failure: Callable[..., str], tmp_path: Path
) -> None:
    save(tmp_path / "model.safetensors", {prefix + name: x for name, x in tensors.items()})
    assert f"is missing; there is {prefix}model.embed_tokens.weight, whose name begins otherwise" in failure()


def test_tensor_that_nobody_used(tensors: Tensors, tmp_path: Path, failure: Callable[..., str]) -> None:
    save(tmp_path / "model.safetensors", {**tensors, "model.layers.0.self_attn.q_proj.bias": np.ones(8, np.float32)})
    message = failure()
    assert str(tmp_path / "model.safetensors") in message
    assert "model.layers.0.self_attn.q_proj.bias [8]" in message
    save(tmp_path / "model.safetensors", {**tensors, **{f"model.layers.{i}.x": np.ones(1, np.float32) for i in (9, 2)}})
    assert "model.layers.2.x" in failure()  # the first by name, on every run
    assert "model.layers.1" in failure({**LLAMA, "num_hidden_layers": 1})


def test_wrong_shapes(tensors: Tensors, tmp_path: Path, failure: Callable[..., str]) -> None:
    for name, x in tensors.items():
        wrong = np.concatenate([x, x])
        save(tmp_path / "model.safetensors", {**tensors, name: wrong})
        message = failure()
        assert f"{name} has shape {list(wrong.shape)}; config.json asks for {list(x.shape)}" in message
        assert "model.safetensors" in message
    name = "model.layers.0.mlp.down_proj.weight"
    save(tmp_path / "model.safetensors", {**tensors, name: tensors[name].T.copy()})
    assert f"{name} has shape [6, 8]; config.json asks for [8, 6]" in failure()


def test_dtypes_that_are_not_weights(tensors: Tensors, tmp_path: Path, failure: Callable[..., str]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    save(tmp_path / "model.safetensors", {**tensors, name: tensors[name].astype(np.float64)})
    assert f"{name} has dtype F64; supported: F32, F16, BF16" in failure()
    save(tmp_path / "model.safetensors", {**tensors, name: tensors[name].astype(np.float16)})
    assert "different dtypes" in failure()
    assert name in failure()
    name = "model.norm.weight"  # alone in its weight: norms in float32 beside 16-bit matrices are common
    save(tmp_path / "model.safetensors", {**tensors_of(LLAMA, np.float16), name: tensors[name]})
    assert load(tmp_path)["norm"].dtype == np.float32


def test_truncated_file(tensors: Tensors, tmp_path: Path, failure: Callable[..., str]) -> None:
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    whole = path.read_bytes()
    for size in (0, 3, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert failure().startswith(f"{path} is truncated or corrupt: ")
    path.write_bytes(whole + b"\0")
    assert failure().startswith(f"{path} is truncated or corrupt: ")


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_corrupt_headers(tmp_path: Path, failure: Callable[..., str]) -> None:
    path = tmp_path / "model.safetensors"
    x = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    for changes in (
        {"b": entry([4], 8, 24)},  # overlaps a
        {"b": entry([4], 0, 16)},
        {"b": entry([4], 16, 48)},  # beyond the file
        {"b": entry([3], 16, 32)},  # shape and size differ
        {"b": entry([4], 32, 16)},
        {"b": entry([2**62, 2**62], 16, 32)},  # a product that overflows
        {"b": entry([4], 16, 32, "F33")},
        {"b": 5},
    ):
        save(path, x, **changes)
        assert failure().startswith(f"{path} is truncated or corrupt: ")
    for content in (
        struct.pack("<Q", 10_000) + b"{}",  # a header longer than the file
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
    ):
        path.write_bytes(content)
        assert failure().startswith(f"{path} is truncated or corrupt: ")


def test_no_file_that_can_be_read(tensors: Tensors, tmp_path: Path, failure: Callable[..., str]) -> None:
    assert failure() == f"{tmp_path} has no model.safetensors"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin cannot be read; convert to safetensors" in failure()
    path = tmp_path / "model.safetensors"
    path.symlink_to(tmp_path / "nowhere")
    assert failure().startswith(f"cannot read {path}: ")
    path.unlink()
    path.mkdir()
    assert str(path) in failure()
    path.rmdir()
    for i in (1, 2):
        save(tmp_path / f"model-{i}.safetensors", tensors)
    assert f"2 safetensors files but no {INDEX}" in failure()
    save(path, tensors)
    assert load(tmp_path)["norm"].shape == (8,)  # consolidated copies beside it are not read


@pytest.fixture
def shards(tensors: Tensors, tmp_path: Path) -> dict[str, str]:
    """A checkpoint of two shards; the weight map of its index."""
    half = len(tensors) // 2
    parts = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for file, part in zip(files, parts, strict=True):
        save(tmp_path / file, part)
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    write_index(tmp_path, where)
    return where


def write_index(folder: Path, where: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))


def test_shards(shards: dict[str, str], tensors: Tensors, tmp_path: Path) -> None:
    found = open_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(t.data, tensors[name]) for name, t in found.items() if isinstance(t.data, np.ndarray))
    assert {t.file.name for t in found.values()} == set(shards.values())
    assert load(tmp_path)["1.gate_up_proj"].shape == (12, 8)


def test_shards_and_index_that_disagree(
    shards: dict[str, str], tensors: Tensors, tmp_path: Path, failure: Callable[..., str]
) -> None:
    first, second = sorted(set(shards.values()))
    here, there = (next(n for n, f in shards.items() if f == file) for file in (first, second))
    write_index(tmp_path, {**shards, here: second})
    assert failure() == f"{tmp_path / second}: tensor {here} is missing, though {INDEX} places it there"
    write_index(tmp_path, {**shards, "model.extra": first})
    assert f"{tmp_path / first}: tensor model.extra is missing" in failure()
    write_index(tmp_path, {n: f for n, f in shards.items() if n != there})
    assert failure() == f"{tmp_path / second}: tensor {there} is not listed in {INDEX}"
    wrong: Any
    for wrong in (None, [], {"a": 1}):
        write_index(tmp_path, wrong)
        assert failure() == f"{tmp_path / INDEX} has no weight_map"
    (tmp_path / INDEX).write_text("{")
    assert f"{tmp_path / INDEX} is not valid JSON" in failure()
    write_index(tmp_path, shards)
    save(tmp_path / second, {**{n: tensors[n] for n, f in shards.items() if f == second}, here: tensors[here]})
    assert f"tensor {here} is in both" in failure()
    (tmp_path / second).unlink()
    message = failure()
    count = list(shards.values()).count(second)
    assert message == f"{tmp_path / second} is missing; {INDEX} places {count} tensors in it"


def test_the_whole_file_counts_beside_an_index(shards: dict[str, str], tensors: Tensors, tmp_path: Path) -> None:
    """As in transformers. The index is left over from another sharding, and its shards may be gone or others."""
    save(tmp_path / "model.safetensors", {name: x + 1 for name, x in tensors.items()})
    assert {t.file.name for t in open_tensors(tmp_path).values()} == {"model.safetensors"}
    assert np.array_equal(load(tmp_path)["norm"].array(), tensors["model.norm.weight"] + 1)
    (tmp_path / INDEX).write_text("{")
    assert load(tmp_path)["norm"].shape == (8,)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors"])
def test_shards_outside_the_folder_are_not_read(name: str, tensors: Tensors, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save(tmp_path / "outside.safetensors", tensors)
    write_index(folder, dict.fromkeys(tensors, name))
    with pytest.raises(CheckpointError, match="names a shard outside the folder"):
        open_tensors(folder)


@pytest.mark.parametrize("folder", ["stories260K-bf16", "stories260K-sharded"])
def test_the_same_weights_in_other_files(shared: Path, folder: str) -> None:
    raw = json.loads((shared / "models/stories260K/config.json").read_text())
    one, other = (load(shared / "models" / name, raw) for name in ("stories260K", folder))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        wanted, found = weight.array(), other[name].array()
        assert np.array_equal(wanted.astype(found.dtype), found)
