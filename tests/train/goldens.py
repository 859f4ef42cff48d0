"""The goldens of training (tests/golden/README.md): tiny models, and torch's float64 gradients of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.paths import ROOT

__all__ = ["CASES", "TRAINING", "Array", "Golden", "golden", "relative_error", "whole_error"]

TRAINING = ROOT / "tests" / "golden" / "training"
CASES = sorted(path.name for path in TRAINING.iterdir() if path.is_dir())
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Golden:
    """A case. ids: int [B, T+1]; loss, gradients: torch's in float64; bf16_errors: those of its own bf16 gradients."""

    folder: Path
    ids: Array
    loss: float
    gradients: Mapping[str, Array]
    bf16_errors: Mapping[str, float]
    bf16_error: float
    bf16_loss_error: float


@cache
def golden(name: str) -> Golden:
    folder = TRAINING / name
    meta = json.loads((folder / "meta.json").read_text())
    low = meta["bfloat16"]
    return Golden(
        folder,
        np.array(meta["token_ids"]),
        meta["loss"],
        load_file(folder / "gradients.safetensors"),
        low["errors"],
        low["error"],
        low["loss_error"],
    )


def relative_error(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted|, as norms."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def whole_error(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The same of all arrays as one vector."""
    one, other = (np.concatenate([arrays[name].ravel() for name in wanted]) for arrays in (found, wanted))
    return relative_error(one, other)
