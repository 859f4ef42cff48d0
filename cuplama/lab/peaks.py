"""The machine's peaks, measured: bytes read per second, and operations per second of a large matrix product.

Every speed that ``cuplama bench`` and ``cuplama kernels bench`` print stands beside these, from the same run. On a GPU
the bytes are those of ``cuda_src/peaks.cu``, which does nothing but read; the product is cuBLAS's, in the model's
dtype. On NumPy both are NumPy's own. The data is random: zeros can be faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import Backend
from ..backends.cuda.backend import CudaBackend
from ..dtypes import DTYPES, Array, dtype_name
from ..errors import DeviceError
from ..ops import OPS
from .random_weights import random_weight
from .timing import seconds

__all__ = ["READ_KERNEL", "Peaks", "measure"]

READ_KERNEL = ("peaks.cu", "read_sum")  # file and name of the kernel that does nothing but read
_RUN = 8 * 256  # vectors of 16 bytes that a thread block reads before it goes on to its next ones
_MAX_PROBE = 4 << 30  # bytes that the kernel reads: far more than any L2 holds; less where memory is short
_HOST_PROBE = 256 << 20  # bytes that NumPy reads


@dataclass(frozen=True)
class Peaks:
    """read: bytes per second; arithmetic: operations per second of a product in ``dtype``, two per multiply-add."""

    read: float
    arithmetic: float
    dtype: str

    def percent_read(self, rate: float) -> float:
        """What per cent of the read peak a rate in bytes per second is."""
        return 100 * rate / self.read

    def percent_arithmetic(self, rate: float) -> float:
        """What per cent of the matrix peak a rate in operations per second is."""
        return 100 * rate / self.arithmetic

    def fields(self) -> dict[str, Any]:
        """The peaks by stable names."""
        return {
            "read_gigabytes_per_second": self.read / 1e9,
            "matrix_teraflops": self.arithmetic / 1e12,
            "matrix_dtype": self.dtype,
        }


def measure(backend: Backend, probe: int | None = None, side: int | None = None, repeats: int = 10) -> Peaks:
    """Both peaks. probe: bytes to read; side: of the square matrices; by default as large as the memory allows.

    The best of the repeats counts: a peak is what was reached once. Raises DeviceError if the reading kernel's sum is
    wrong.
    """
    if isinstance(backend, CudaBackend):
        free = backend.free_memory()
        side = side or (8192 if free > 4 << 30 else 4096)
        read = _read_gpu(backend, probe or min(_MAX_PROBE, free // 4), repeats)
    else:
        side = side or 1024
        read = _read_host(probe or _HOST_PROBE, repeats)
    return Peaks(read, _product(backend, side, repeats), dtype_name(backend.dtype))


def _read_gpu(backend: CudaBackend, probe: int, repeats: int) -> float:
    """Bytes per second that the reading kernel reaches; its sum is checked first."""
    blocks = 8 * backend.gpu.limits.sms
    y = backend.zeros((blocks,), DTYPES["u32"])
    with backend.gpu as gpu:
        function = gpu.function(*READ_KERNEL, 0)

    def read(x: Array) -> None:
        with backend.gpu:
            function((blocks, 1, 1), (256, 1, 1), (x, y, np.int64(x.nbytes // 16)), 0)

    vectors = 3 * blocks * _RUN + 5  # each block reads several runs, the last one not to its end
    words = np.random.default_rng(0).integers(0, 2**32, 4 * vectors, dtype=np.uint32)
    read(backend.upload(words))
    if int(backend.download(y).sum(dtype=np.uint32)) != int(words.sum(dtype=np.uint32)):
        raise DeviceError("the kernel of peaks.cu computes a wrong sum, so its time would mean nothing")
    x = backend.load_weight(random_weight("probe", (probe // 16 * 16 // backend.dtype.itemsize,), backend.dtype))
    read(x)
    return float(x.nbytes / min(seconds(backend, lambda: read(x), repeats).values))


def _read_host(probe: int, repeats: int) -> float:
    """Bytes per second that NumPy reads."""
    x = random_weight("probe", (probe // 4,), DTYPES["f32"]).array()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        x.max()  # reads at the memory's speed; a sum would be bound by its arithmetic
        taken.append(time.perf_counter() - began)
    return x.nbytes / min(taken)


def _product(backend: Backend, side: int, repeats: int) -> float:
    """Operations per second of a product of two square matrices."""

    def matrix(name: str) -> Array:
        return backend.load_weight(random_weight(name, (side, side), backend.dtype))

    x, w = matrix("x"), matrix("w")

    def body() -> None:
        backend.call(OPS["linear"], (x, w), {"U": "T"})

    body()
    return 2 * side**3 / min(seconds(backend, body, repeats).values)
