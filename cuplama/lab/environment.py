"""Where a measurement was made: device, driver, versions and date, to be kept with its numbers."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .. import __version__
from ..backends import Backend
from ..backends.cuda import driver
from ..dtypes import dtype_name

__all__ = ["CUPY_PACKAGES", "environment", "installed_version", "one_line"]

CUPY_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")  # the names under which CuPy is installed


def environment(backend: Backend) -> dict[str, str]:
    """Device, driver, versions and date, by stable names."""
    found = {"device": backend.describe(), "dtype": dtype_name(backend.dtype)}
    if backend.activations != "auto":
        found["activations"] = backend.activations
    if backend.deterministic:
        found["deterministic"] = "yes"
    if backend.name == "cuda":
        library = driver.load_driver()
        found["driver"] = _driver() or "unknown"
        if library is not None:
            found["driver_cuda"] = driver.dotted(driver.driver_version(library))
        found["cupy"] = next(filter(None, map(installed_version, CUPY_PACKAGES)), "unknown")
    found["cuplama"] = __version__
    found["numpy"] = np.__version__
    found["python"] = platform.python_version()
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found


def one_line(facts: Mapping[str, str]) -> str:
    """The environment as one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _driver() -> str | None:
    """The NVIDIA driver's version, where Linux tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    m = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return m[1] if m else None


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
