"""The NVIDIA driver, called directly: whether there is a usable GPU, and the launches that CuPy cannot make.

Imports nothing heavy, so that a machine without a GPU learns so at once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from typing import Any

import numpy as np

__all__ = [
    "OLDEST_ARCH",
    "OLDEST_DRIVER",
    "PdlLaunch",
    "compute_capability",
    "cuda_available",
    "dotted",
    "driver_version",
    "load_driver",
]

OLDEST_ARCH = 75  # sm_75, Turing: the oldest that CUDA 13 and the kernels support
OLDEST_DRIVER = 12000  # as cuDriverGetVersion counts: CUDA 12.0, driver 525


def cuda_available(device: int = 0) -> tuple[bool, str]:
    """Whether a CUDA backend can be made, and if not, the reason in a few words."""
    driver = load_driver()
    if driver is None:
        return False, "no NVIDIA driver is installed (libcuda.so.1 not found)"
    if code := driver.cuInit(0):
        reasons = {100: "the NVIDIA driver finds no GPU", 804: "the NVIDIA driver does not support this GPU"}
        return False, reasons.get(code, f"the NVIDIA driver does not start (cuInit: error {code})")
    if (version := driver_version(driver)) < OLDEST_DRIVER:
        return False, f"the NVIDIA driver is too old (CUDA {dotted(version)}; driver 525 or newer is needed)"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if device >= count.value:
        return False, f"there is no GPU {device} ({count.value} found)" if count.value else "no NVIDIA GPU is visible"
    if (arch := compute_capability(driver, device)) < OLDEST_ARCH:
        return False, f"the GPU is too old (sm_{arch}; sm_{OLDEST_ARCH} or newer is needed)"
    if importlib.util.find_spec("cupy") is None:
        return False, "cupy is not installed (pip install cupy-cuda12x)"
    return True, ""


def load_driver() -> ctypes.CDLL | None:
    """The CUDA driver library, or None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_version(driver: ctypes.CDLL) -> int:
    """The newest CUDA version the driver supports, as 12090 for 12.9."""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def compute_capability(driver: ctypes.CDLL, device: int) -> int:
    """A GPU's architecture: 75 for sm_75."""
    return 10 * _attribute(driver, device, 75) + _attribute(driver, device, 76)


def _attribute(driver: ctypes.CDLL, device: int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value


def dotted(version: int) -> str:
    """ "12.9" for 12090."""
    return f"{version // 1000}.{version % 1000 // 10}"


# ---- programmatic dependent launch -----------------------------------------------------------------------------------
class _Attribute(ctypes.Structure):
    """CUlaunchAttribute. The value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class PdlLaunch:
    """A kernel launch that may begin before the kernel ahead of it has ended: the kernel itself waits where it must.

    CuPy has no access to the attribute, so the driver is called directly. If it refuses, the launch is an ordinary one.
    """

    _PROGRAMMATIC_STREAM_SERIALIZATION = 6
    OLDEST_ARCH, OLDEST_DRIVER = 90, 12030  # a captured graph keeps such edges from CUDA 12.3 on

    def __init__(self, driver: ctypes.CDLL, function: Any, stream: int) -> None:
        self._driver, self._plain, self._stream = driver, function, stream
        self._attribute = _Attribute(self._PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int) -> None:
        values = [np.array(a if isinstance(a, np.generic) else np.uintp(a.data.ptr)) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*[v.ctypes.data for v in values])
        config = _Config(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared, self._stream,
            ctypes.pointer(self._attribute), 1,
        )  # fmt: skip
        if self._driver.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self._plain.ptr), pointers, None):
            self._plain(grid, block, args, shared)
