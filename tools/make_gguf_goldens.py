"""Write tests/data/gguf: random blocks of every quantised type, and tiny whole models, with what they mean.

    python -m tools.make_gguf_goldens

Needs the `gguf` package, whose writer, quantisers and dequantisers are the oracle here. Everything follows from the
seeds. A model is a golden case (tests/golden), or a random one of the K types, as a GGUF file; its logits are those of
the same model in Hugging Face's layout with the numbers that the package dequantises.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import cuplama
from cuplama.config import parse_config
from cuplama.ops.signature import dim_value
from tests.gguf_models import Piece, convert
from tests.paths import DATA, GOLDEN

__all__ = ["main"]

Array = np.ndarray[Any, Any]
OUT = DATA / "gguf"
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
FLOATS = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of a block
# Case -> the type of tensors whose name has a word in it; the first that fits, and F16 or F32 where none does.
MODELS: Mapping[str, Mapping[str, str]] = {
    "llama3-gqa": {"attn_q": "Q8_0", "attn_k": "Q4_0", "attn_v": "Q5_1", "attn_output": "Q4_1", "ffn_": "Q5_0"},
    "qwen2": {"attn_v": "Q8_0", "attn_": "Q4_0", "ffn_": "Q5_1", "token_embd": "Q8_0"},
    "qwen3": {"attn_": "Q5_0", "ffn_": "Q8_0", "output": "Q4_1"},
    "phi3-longrope": {"attn_": "Q4_1", "ffn_": "Q8_0", "output": "Q8_0"},
    "gpt2": {"attn_": "Q8_0", "ffn_": "Q5_0", "token_embd": "Q4_0"},
}
K_TYPES = {
    "attn_v": "Q6_K", "attn_output": "Q8_0", "attn_": "Q4_K", "ffn_down": "Q6_K", "ffn_up": "Q5_K", "ffn_": "Q4_K",
    "output.": "Q6_K", "token_embd": "Q4_K",
}  # fmt: skip
K_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "rms_norm_eps": 2e-3, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator, size: float = 0.05) -> Array:
    """Bytes [rows, bytes] of random codes, and floats of that size."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    for at in FLOATS.get(kind, (0,)):
        scale = np.abs(rng.normal(0, size, raw.shape[:2])) + size / 4
        raw[:, :, at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def dequantised(raw: Array, kind: str) -> Array:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    found: Array = dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32)
    return found


def write_blocks() -> None:
    rng, found = np.random.default_rng(1), dict[str, Array]()
    for kind in TYPES:
        found[kind] = random_blocks(kind, 5, 512, rng)
        found[f"{kind}.numbers"] = dequantised(found[kind], kind)
    np.savez_compressed(OUT / "blocks.npz", **found)  # type: ignore[arg-type]


def stored_as(name: str, piece: Piece, types: Mapping[str, str], rng: np.random.Generator) -> tuple[str, Array]:
    """(type, what the file holds) of a tensor. K types have no quantiser: they are random blocks."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    if piece.array.ndim < 2 or name.startswith("position"):
        return "F32", piece.array.astype(np.float32)
    kind = next((kind for word, kind in types.items() if word in name), "F16")
    rows, columns = piece.array.shape
    if columns % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = "F16"
    if kind == "F16":
        return kind, piece.array.astype(np.float16)
    if kind.endswith("_K"):
        return kind, random_blocks(kind, rows, columns, rng, 0.0004 if kind == "Q6_K" else 0.002)
    return kind, quantize(piece.array, GGMLQuantizationType[kind])


def write_model(name: str, folder: Path, types: Mapping[str, str]) -> None:
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    metadata, pieces = convert(folder)
    rng, tensors = np.random.default_rng(2), dict[str, Array]()
    writer = GGUFWriter(OUT / f"{name}.gguf", metadata.pop("general.architecture"))
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for title, piece in pieces.items():
        kind, data = stored_as(title, piece, types, rng)
        plain = kind in ("F32", "F16")
        writer.add_tensor(title, data, raw_dtype=None if plain else GGMLQuantizationType[kind])
        if piece.source:
            tensors[piece.source] = piece.back(data.astype(np.float32) if plain else dequantised(data, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez_compressed(OUT / f"{name}.npz", **logits_of(folder, tensors))  # type: ignore[arg-type]


def logits_of(folder: Path, tensors: dict[str, Array]) -> dict[str, Array]:
    """Prompts and logits of a folder with other weights, by the float32 reference."""
    found, rng = dict[str, Array](), np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as place:
        config = json.loads((folder / "config.json").read_text())
        (Path(place) / "config.json").write_text(json.dumps(config))
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, Path(place) / "model.safetensors")
        with cuplama.load(place, device="numpy", dtype="float32") as model:
            for i, length in enumerate((1, 13, 45)):
                prompt = rng.integers(0, model.config.vocab_size, length, dtype=np.int32)
                found |= {f"prompt_{i}": prompt, f"logits_{i}": model.logits(prompt.tolist())}
    return found


def random_folder(folder: Path) -> None:
    """A model of ``K_CONFIG``. Its matrices are replaced."""
    config = parse_config(K_CONFIG)
    rng, tensors = np.random.default_rng(4), dict[str, Array]()
    for recipe in config.recipes().values():
        for shape, name in recipe.parts:
            tensors[name] = rng.normal(0, 0.05, [dim_value(d, config.dims()) for d in shape.split(",")]).astype(
                np.float32
            )
            if name.endswith("norm.weight"):
                tensors[name] += 1
    (folder / "config.json").write_text(json.dumps(K_CONFIG))
    save_file(tensors, folder / "model.safetensors")


def main() -> None:
    """Write all of it."""
    OUT.mkdir(parents=True, exist_ok=True)
    write_blocks()
    for name, types in MODELS.items():
        write_model(name, GOLDEN / name, types)
    with tempfile.TemporaryDirectory() as place:
        random_folder(Path(place))
        write_model("llama-k", Path(place), K_TYPES)


if __name__ == "__main__":
    main()
