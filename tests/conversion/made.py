"""A small Llama of random numbers, in a folder: what the tests quantise; and writing that stops on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cuplama.conversion.folder import OutputFolder
from cuplama.dtypes import DTYPES
from cuplama.models.config import parse_config
from tests.tiny import CHARS

__all__ = ["TEXT", "stopped_at", "write_model"]

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 40

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 65, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path, **changes: Any) -> Path:
    """The folder, with config, weights and a tokenizer of characters. changes: of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**_CONFIG, **changes}
    config = parse_config(raw)
    rng = np.random.default_rng(0)
    dims, tensors = config.dims(), {}
    for name, recipe in config.recipes().items():
        if name == "lm_head" and raw["tie_word_embeddings"]:
            continue
        for shape, tensor in recipe.parts:
            size = tuple(int(eval(d, {}, dims)) for d in shape.split(","))
            centre = 1.0 if "norm" in name else 0.0
            values = centre + rng.standard_normal(size) * (0.05 if centre else 0.15)
            tensors[tensor] = values.astype(DTYPES[config.stored])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(CHARS / "tokenizer.json", folder)
    (folder / "README.md").write_text("not copied")
    return folder


def stopped_at(stop: int, part: float = 0) -> Callable[[OutputFolder, Mapping[str, Any]], None]:
    """``OutputFolder.write`` that is stopped when it comes to the stop-th time, counted from 0.

    part: the share of the tensors that are written then, without a record of them.
    """
    write, times = OutputFolder.write, 0

    def stopped(self: OutputFolder, tensors: Mapping[str, Any]) -> None:
        nonlocal times
        if times == stop:
            self._write(dict(list(tensors.items())[: int(part * len(tensors))]))
            raise KeyboardInterrupt
        times += 1
        write(self, tensors)

    return stopped
