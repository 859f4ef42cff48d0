"""``cuplama doctor`` on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

from cuplama.backends.cuda.driver import cuda_available
from cuplama.cli import diagnosis
from cuplama.lab.environment import CUPY_PACKAGES
from tests.fakes import Driver


def _findings() -> dict[str, diagnosis.Finding]:
    return {f.name: f for f in diagnosis.examine()}


def test_without_a_driver_everything_else_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.load_driver", lambda: None)
    found = _findings()
    assert "install the NVIDIA driver" in found["driver"].remedy
    assert {"system", "packages", "cupy", "CUDA headers", "NVRTC", "kernel cache", "a kernel"} <= found.keys()
    assert "no NVIDIA driver" in found["a kernel"].found
    lines: list[str] = []
    assert diagnosis.run(lines.append) == 1
    problems = sum(bool(f.remedy) for f in found.values())
    assert lines[-1].startswith(f"\n{problems} problem")  # the kernel that was not run is none of its own
    assert any(line.startswith("--  a kernel") for line in lines)


def test_every_failing_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, no cupy, no libraries at all."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("cuplama.backends.cuda.driver.load_driver", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    for module in ("cupy", "cupy_backends", "cupy_backends.cuda.libs", "cuda.pathfinder"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("cuplama.backends.cuda.toolkit.toolkit_folders", lambda major: ())
    found = _findings()
    for name in ("driver", "cupy", "CUDA libraries", "CUDA headers", "NVRTC"):
        assert found[name].remedy, name
    assert found["a kernel"].skipped
    assert found["cupy"].remedy == "pip install cupy-cuda12x"


def test_an_unwritable_cache_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    finding = diagnosis._cache()
    assert "not writable" in finding.found
    assert "CUPY_CACHE_DIR" in finding.remedy
    monkeypatch.setattr(diagnosis, "installed_version", lambda p: "14.2" if p == CUPY_PACKAGES[0] else None)
    found = _findings()
    assert [name for name in ("cupy", "NVRTC", "a kernel") if found[name].remedy] == []  # nothing to reinstall
    assert found["NVRTC"].skipped
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "good"))
    assert not diagnosis._cache().remedy


def test_what_was_not_looked_at_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "examine", lambda: iter([diagnosis.Finding("a kernel", "not run", skipped=True)]))
    assert diagnosis.run(lambda line: None) == 1


@pytest.mark.parametrize(
    ("driver", "name", "remedy"),
    [
        (Driver(version=11040), "driver", "update"),
        (Driver(init=100), "GPU", "nvidia-smi"),
        (Driver(count=0), "GPU", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_bad_driver_is_explained(driver: Any, name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.load_driver", lambda: driver)
    monkeypatch.setattr(driver, "cuDeviceGetName", lambda b, n, d: 0, raising=False)
    monkeypatch.setattr(driver, "cuDeviceTotalMem_v2", lambda b, d: 0, raising=False)
    found = {f.name: f for f in diagnosis._driver()}
    assert remedy in found[name].remedy


@pytest.mark.gpu
def test_a_machine_with_a_gpu_is_found_ready() -> None:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    found = _findings()
    assert "compiled and run on" in found["a kernel"].found
    assert not any(f.remedy for f in found.values()), [str(f) for f in found.values() if f.remedy]
