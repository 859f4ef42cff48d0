"""``cuplama doctor``: what this machine offers for CUDA, and what to install or change where something is missing.

Every check works without a GPU and without CuPy, and a check that fails does not stop the ones after it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backends.cuda import driver
from ..lab.environment import CUPY_PACKAGES, installed_version
from ..lab.report import counted
from ..ops import OPS

__all__ = ["LIBRARIES", "PACKAGES", "Finding", "examine", "run"]

PACKAGES = ("cuplama", "numpy", "safetensors", "tokenizers", "ml_dtypes")
_NO_CACHE = "not tried without a kernel cache"
LIBRARIES = {"cudart": "nvidia-cuda-runtime-cu12", "nvrtc": "nvidia-cuda-nvrtc-cu12", "cublasLt": "nvidia-cublas-cu12"}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and, where that is not good, what to do.

    skipped: not looked at, because of a problem that has a line of its own; it is no further problem.
    """

    name: str
    found: str
    remedy: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        sign = "--" if self.remedy or self.skipped else "ok"
        return f"{sign}  {self.name:<18} {self.found}" + (f"\n    {'':<18} -> {self.remedy}" if self.remedy else "")


def run(echo: Callable[[str], object] = print) -> int:
    """Print every finding. Returns 0 if models can run on a GPU, else 1."""
    bad, skipped = 0, False
    for finding in examine():
        echo(str(finding))
        bad += bool(finding.remedy)
        skipped = skipped or finding.skipped
    bad = max(bad, int(skipped))  # what was not looked at is not ready
    echo(f"\n{counted(bad, 'problem')}; models run on NumPy until solved" if bad else "\nready for CUDA")
    return 1 if bad else 0


def examine() -> Iterator[Finding]:
    """All checks, from the ground up."""
    yield Finding("system", f"{platform.platform()}, Python {platform.python_version()}")
    yield Finding("packages", ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in PACKAGES))
    yield from _driver()
    cache = _cache()
    yield cache
    usable = not cache.remedy  # CuPy makes the folder when it is imported, and NVRTC is used through CuPy
    yield _cupy(usable)
    yield from _libraries()
    yield _headers()
    yield _nvrtc() if usable else Finding("NVRTC", _NO_CACHE, skipped=True)
    yield _kernel() if usable else Finding("a kernel", _NO_CACHE, skipped=True)


def _driver() -> Iterator[Finding]:
    library = driver.load_driver()
    if library is None:
        yield Finding("driver", "not found (libcuda.so.1)", "install the NVIDIA driver, 525 or newer")
        return
    works, reason = library.cuInit(0) == 0, driver.cuda_available()[1]
    version = driver.driver_version(library)
    old = "update the NVIDIA driver to 525 or newer" if version < driver.OLDEST_DRIVER else ""
    yield Finding("driver", f"supports CUDA up to {driver.dotted(version)}", old)
    if not works:
        yield Finding(
            "GPU", reason, "check that nvidia-smi works, and CUDA_VISIBLE_DEVICES; in a container: --gpus all"
        )
        return
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        yield Finding("GPU", "none is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    for i in range(count.value):
        yield _gpu(library, i)


def _gpu(library: ctypes.CDLL, device: int) -> Finding:
    name = ctypes.create_string_buffer(100)
    total = ctypes.c_size_t()
    library.cuDeviceGetName(name, 100, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    arch = driver.compute_capability(library, device)
    text = f"{name.value.decode()}, sm_{arch}, {total.value / 1e9:.1f} GB{_free(device)}"
    old = f"sm_{driver.OLDEST_ARCH} or newer is needed" if arch < driver.OLDEST_ARCH else ""
    return Finding(f"GPU {device}", text, old)


def _free(device: int) -> str:
    """Free memory, if CuPy can tell."""
    try:
        from cupy.cuda import Device

        return f" ({Device(device).mem_info[0] / 1e9:.1f} GB free)"
    except Exception:  # whatever is wrong with CuPy has a line of its own
        return ""


def _cupy(usable: bool) -> Finding:
    """usable: whether there is a kernel cache, without which CuPy does not import."""
    installed = [f"{name} {version}" for name in CUPY_PACKAGES if (version := installed_version(name))]
    if not installed:
        return Finding("cupy", "not installed", "pip install cupy-cuda12x")
    if len(installed) > 1:
        return Finding("cupy", ", ".join(installed), "two CuPy packages overwrite each other; pip uninstall one")
    if not usable:
        return Finding("cupy", f"{installed[0]}, {_NO_CACHE}", skipped=True)
    try:
        import cupy  # noqa: F401
    except Exception as e:  # CuPy raises several kinds, by what is missing
        return Finding("cupy", f"{installed[0]} does not import: {str(e).strip().splitlines()[0]}", "reinstall cupy")
    return Finding("cupy", installed[0])


def _libraries() -> Iterator[Finding]:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        yield Finding("CUDA libraries", "cuda-pathfinder is not installed", "pip install cupy-cuda12x")
        return
    for name, wheel in LIBRARIES.items():
        try:
            loaded = load_nvidia_dynamic_lib(name)
            yield Finding(name, f"{loaded.abs_path} ({loaded.found_via})")
        except Exception as e:
            yield Finding(name, f"not found: {str(e).strip().splitlines()[0][:120]}", f"pip install {wheel}")


def _headers() -> Finding:
    from ..backends.cuda.toolkit import toolkit_folders

    found = {major: toolkit_folders(major) for major in (12, 13)}
    if not any(found.values()):
        return Finding("CUDA headers", "cuda_fp16.h not found", "pip install 'cuda-toolkit[cudart,cccl]==12.*'")
    return Finding("CUDA headers", ", ".join(f"{major}: {folders[0]}" for major, folders in found.items() if folders))


def _nvrtc() -> Finding:
    from ..backends.cuda.nvrtc import compile_program, nvrtc_library
    from ..errors import CompileError, DeviceError

    try:
        nvrtc = nvrtc_library()
        major, minor = nvrtc.getVersion()
        newest = max(nvrtc.getSupportedArchs())
        compile_program("residual.cu", ["add"], 80)
    except CompileError as e:
        return Finding("NVRTC", f"compiles nothing: {e}", "reinstall 'cuda-toolkit[nvrtc,cudart,cccl]==12.*'")
    except DeviceError as e:
        return Finding("NVRTC", str(e), "pip install 'cuda-toolkit[nvrtc]==12.*'")
    return Finding("NVRTC", f"{major}.{minor}, up to sm_{newest}; compiles without a GPU")


def _cache() -> Finding:
    folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        remedy = "set CUPY_CACHE_DIR to a folder that is"
        return Finding("kernel cache", f"{folder} is not writable ({e.strerror})", remedy)
    return Finding("kernel cache", f"{folder}, writable")


def _kernel() -> Finding:
    """Compile one kernel for the GPU at hand, run it, and compare."""
    works, reason = driver.cuda_available()
    if not works:
        return Finding("a kernel", f"not run: {reason}", skipped=True)
    try:
        from ..backends.cuda.backend import CudaBackend

        backend = CudaBackend("f32")
        try:
            a, b = np.arange(300, dtype=np.float32).reshape(3, 100), np.full((3, 100), 0.5, np.float32)
            (sum_,) = backend.call(OPS["add"], (backend.upload(a), backend.upload(b)), {})
            right = np.array_equal(backend.download(sum_), a + b)
            where = backend.describe()
        finally:
            backend.close()
    except Exception as e:  # any failure is what the doctor is for
        return Finding("a kernel", f"{type(e).__name__}: {e}", "reinstall cupy and the CUDA libraries above")
    if not right:
        return Finding("a kernel", "runs, but computes wrong sums", "suspect the GPU: run nvidia-smi -q -d ECC")
    return Finding("a kernel", f"compiled and run on {where}")
