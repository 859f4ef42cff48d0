"""Which backend and which dtype are chosen where the caller leaves it open."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
import cuplama.loading as load_module
from cuplama.errors import DeviceError
from cuplama.loading import DTYPE_NAMES
from cuplama.models.config import load_config
from tests.tiny import LLAMA, copy, load

STORED: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


class OpenedError(Exception):
    """Ends a test where a CUDA backend would begin."""


def stored_as(dtype: str, folder: Path) -> Path:
    """The tiny Llama with weights of another dtype."""
    copy(LLAMA, folder)
    tensors = {name: x.astype(STORED[dtype]) for name, x in load_file(LLAMA / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes for which a CUDA backend was opened, on a machine that seems to have a GPU."""
    found: list[str] = []

    def backend(dtype: str) -> None:
        found.append(dtype)
        raise OpenedError

    monkeypatch.setattr("cuplama.backends.cuda.backend.CudaBackend", backend)
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (True, ""))
    return found


@pytest.mark.parametrize("stored", STORED)
def test_auto_is_the_checkpoints_dtype_on_cuda(stored: str, tmp_path: Path, opened: list[str]) -> None:
    folder = stored_as(stored, tmp_path)
    for device in ("cuda", "auto"):
        with pytest.raises(OpenedError):
            cuplama.load(folder, device=device)
    assert opened == [stored, stored]


@pytest.mark.parametrize("stored", STORED)
def test_auto_is_float32_on_numpy(stored: str, tmp_path: Path) -> None:
    with load(stored_as(stored, tmp_path)) as model:
        assert model.backend.dtype == np.float32


@pytest.mark.parametrize("name", [name for name in DTYPE_NAMES if name != "auto"])
def test_a_dtype_that_is_asked_for_is_the_one(name: str, opened: list[str]) -> None:
    with pytest.raises(OpenedError):
        cuplama.load(LLAMA, device="cuda", dtype=name)
    assert opened == [DTYPE_NAMES[name]]
    with load(LLAMA, dtype=name) as model:
        assert model.backend.dtype == STORED[DTYPE_NAMES[name]]


def test_without_a_gpu_auto_is_numpy_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (False, "the reason"))
    with caplog.at_level(logging.WARNING, "cuplama"), cuplama.load(LLAMA) as model:
        assert model.backend.name == "numpy"
    assert caplog.messages == ["running on NumPy: the reason"]
    with pytest.raises(DeviceError, match="device cuda cannot be used: the reason"):
        cuplama.load(LLAMA, device="cuda")


def test_heads_that_no_cuda_kernel_has(monkeypatch: pytest.MonkeyPatch, opened: list[str], tmp_path: Path) -> None:
    raw = json.loads((LLAMA / "config.json").read_text())
    folder = copy(LLAMA, tmp_path, config={**raw, "head_dim": 12})
    assert load_config(folder).head_dim == 12
    monkeypatch.setattr(load_module, "load_weights", lambda *_: {})
    with pytest.raises(DeviceError, match=r"head_dim = 12: the CUDA kernels take multiples of 8 up to 256; --device"):
        cuplama.load(folder, device="cuda")
    assert opened == []
