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
import cuplama.device as device_module
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

    def backend(dtype: str, activations: str, deterministic: bool) -> None:
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
    with pytest.raises(
        DeviceError, match=r"head_dim = 12: the CUDA kernels take multiples of 8 up to 256, and of 16 up to 512; --"
    ):
        cuplama.load(folder, device="cuda")
    assert opened == []


@pytest.mark.parametrize(
    ("free", "tokens"),
    [
        (2.0**40, 8 * 128),  # eight texts of full length
        (float("inf"), 8 * 128),
        (4 * 7.5 * 16384, 7 * 64),  # whole pages of 16 KiB in a quarter of what is free
        (4 * 7.0 * 16384, 7 * 64),
        (4 * 7.0 * 16384 - 1, 6 * 64),
        (4 * 1.0 * 16384, 128),  # one text of full length at least
    ],
)
def test_a_cache_on_numpy_that_takes_what_there_is(free: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_free_memory", lambda: free)
    with load(LLAMA, context=128, cache_tokens="auto") as model:
        assert model.engine.cache.pages * 64 == tokens


GB = 2**30


def system(root: Path, groups: str, **files: int | str) -> Path:
    """Files of a Linux with 16 GB that can be had. files: contents below /sys/fs/cgroup, "__" for a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: 99999999 kB\nMemAvailable: {16 * GB // 1024} kB\nHugePages_Total: 0\n"
    )
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


CACHE = f"anon 1\nactive_file {GB}\ninactive_file {GB // 2}\nshmem {GB}"
SYSTEMS: dict[str, tuple[str, dict[str, int | str], float]] = {
    "no groups": ("", {}, 16),
    "version 2, no limit": ("0::/\n", {"memory_max": "max", "memory_current": 5 * GB, "memory_stat": "anon 1"}, 16),
    # A container sees its own group as the root: 4 GB, 3 used, of which 1.5 are file cache that can be given up.
    "version 2, a container": (
        "0::/\n", {"memory_max": 4 * GB, "memory_current": 3 * GB, "memory_stat": CACHE}, 2.5
    ),
    "version 2, a limit above the machine": (
        "0::/\n", {"memory_max": 64 * GB, "memory_current": GB, "memory_stat": "anon 1"}, 16
    ),
    # A service with no limit of its own in a slice that has one.
    "version 2, the group above": (
        "0::/user.slice/x.scope\n",
        {"user.slice__x.scope__memory_max": "max", "user.slice__x.scope__memory_current": GB,
         "user.slice__x.scope__memory_stat": "anon 1", "user.slice__memory_max": 8 * GB,
         "user.slice__memory_current": 6 * GB, "user.slice__memory_stat": "anon 1"},
        2,
    ),
    "version 2, more used than allowed": (
        "0::/\n", {"memory_max": GB, "memory_current": 2 * GB, "memory_stat": "anon 1"}, 0
    ),
    "version 2, a group outside of what is seen": (
        "0::/../../other\n", {"memory_max": 3 * GB, "memory_current": GB, "memory_stat": "anon 1"}, 2
    ),
    # Version 1 inside a container: the name is the host's, the files are at the root.
    "version 1, a container": (
        "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n",
        {"memory__memory_limit_in_bytes": 4 * GB, "memory__memory_usage_in_bytes": 3 * GB,
         "memory__memory_stat": f"active_file 7\ntotal_active_file {GB}\ntotal_inactive_file 0"},
        2,
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        {"memory__memory_limit_in_bytes": 9223372036854771712, "memory__memory_usage_in_bytes": 3 * GB,
         "memory__memory_stat": "cache 1"},
        16,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("groups", "files", "free"), SYSTEMS.values(), ids=SYSTEMS)
def test_a_containers_limit_counts_as_the_machines(
    groups: str, files: dict[str, int | str], free: float, tmp_path: Path
) -> None:
    assert device_module._free_memory(system(tmp_path, groups, **files)) == free * GB


def test_a_system_that_says_nothing_of_groups(tmp_path: Path) -> None:
    assert device_module._free_memory(tmp_path) > 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    assert device_module._free_memory(tmp_path) > 1024


def test_a_model_that_the_container_cannot_hold_stays_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = system(tmp_path, "0::/\n", memory_max=100_000, memory_current=0, memory_stat="anon 1")
    free = device_module._free_memory
    monkeypatch.setattr(device_module, "_free_memory", lambda: free(root))
    monkeypatch.setattr("cuplama.device.memory.cache_bytes", lambda *args: 0)
    load(LLAMA, context=8).close()
    assert "do not fit; they stay in the file" in caplog.text
