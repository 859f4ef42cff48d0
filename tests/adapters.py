"""A LoRA adapter of random numbers in a folder, for the tests that need one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cuplama.models.config import load_config
from cuplama.models.new_adapter import adapter_files, initial_weights, new_adapter

__all__ = ["LORA", "write_adapter"]

LORA = Path(__file__).parent / "golden" / "lora"


def write_adapter(
    folder: Path, base: Path, targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 3, **changes: Any
) -> Path:
    """The folder, with an adapter of the model in ``base``. changes: of adapter_config.json; None takes a field out."""
    config = new_adapter(load_config(base), rank, 6.0, targets)
    rng = np.random.default_rng(rank)
    assert config.adapter is not None
    settings, tensors = adapter_files(config, initial_weights(config, 5), f"org/{base.name}")
    tensors = {
        name: 0.3 * rng.standard_normal(t.shape, np.float32) if ".lora_B." in name else np.ascontiguousarray(t)
        for name, t in tensors.items()
    }
    settings = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
