"""What the machine at hand can do at most, measured: bytes read per second, and arithmetic of a large matrix product.

Every speed that ``cuplama bench`` and ``cuplama kernels bench`` print stands beside these, from the same run. On a GPU
the bytes are those of ``cuda_src/peaks.cu``, which does nothing but read; the product is cuBLAS's, in the model's
dtype. On NumPy both are NumPy's own. The data is random: zeros can be faster.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array, dtype_name
from ..errors import DeviceError
from ..ops import OPS
from ..quant.weight import Weight

__all__ = ["Peaks", "RandomWeight", "Spread", "environment", "header", "measure", "random_weight", "seconds"]

_BLOCK = (1 << 23) + 331  # random values made once; a prime-like length, so that no two rows of a weight are equal
_MOST_PROBE = 4 << 30  # bytes that the read probe goes through on a GPU: far more than any L2
_HOST_PROBE = 256 << 20
_RUN = 8 * 256  # pieces of 16 bytes that a block of peaks.cu reads in one go


@dataclass(frozen=True)
class Peaks:
    """read: bytes per second; arithmetic: operations per second of a product in ``dtype``, two per multiply-add."""

    read: float
    arithmetic: float
    dtype: str

    def percent_read(self, rate: float) -> float:
        return 100 * rate / self.read

    def percent_arithmetic(self, rate: float) -> float:
        return 100 * rate / self.arithmetic


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement: what is in the middle and how far they scatter."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Of the sample (n - 1); 0 for a single value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def half_range(self) -> float:
        """Half the distance between the quartiles."""
        low, high = np.percentile(self.values, (25, 75))
        return float(high - low) / 2


# ---- random weights --------------------------------------------------------------------------------------------------
@cache
def _block(dtype: str, centre: float) -> np.ndarray[Any, Any]:
    """Normal values of deviation 0.02 around ``centre``."""
    values = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
    values *= 0.02
    values += np.float32(centre)
    return values.astype(DTYPES[dtype])


@dataclass(frozen=True)
class RandomWeight:
    """Has the interface of ``checkpoint.Weight`` and holds random values: slices of one block, over and over.

    source: as of a Weight; two weights with the same source are one. centre: the mean, 1 for the scale of a norm.
    """

    name: str
    shape: tuple[int, ...]
    source: tuple[str, ...]
    dtype: np.dtype[Any]
    centre: float = 0.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self, max_bytes: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """(element offset, contiguous 1-D array) pieces of at most ``max_bytes``."""
        block, size = _block(dtype_name(self.dtype), self.centre), math.prod(self.shape)
        step = max(1, min(len(block), max_bytes // self.dtype.itemsize))
        for at in range(0, size, step):
            yield at, block[: min(step, size - at)]

    def array(self) -> np.ndarray[Any, Any]:
        """The whole weight."""
        flat = np.empty(math.prod(self.shape), self.dtype)
        for at, piece in self.chunks(1 << 30):
            flat[at : at + piece.size] = piece
        return flat.reshape(self.shape)


def random_weight(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], source: tuple[str, ...] = (), centre: float = 0.0
) -> Weight:
    """A RandomWeight as backends take it. source: its name if not given."""
    return cast(Weight, RandomWeight(name, shape, source or (name,), dtype, centre))


# ---- time ------------------------------------------------------------------------------------------------------------
def seconds(backend: Backend, body: Callable[[], object], repeats: int) -> Spread:
    """What ``body`` takes on the device, ``repeats`` times over: by events on a GPU, by the clock elsewhere.

    body queues its work on the backend's stream. Warm up first. On a GPU an unmeasured run goes ahead, so that the next
    ones wait in the queue and no interval holds the host's part of a launch.
    """
    if backend.name != "cuda":
        values = []
        for _ in range(repeats):
            began = time.perf_counter()
            body()
            values.append(time.perf_counter() - began)
        return Spread(tuple(values))
    from cupy.cuda import Event, get_elapsed_time

    with _gpu(backend) as gpu:
        events = []
        body()
        for _ in range(repeats):
            pair = (Event(), Event())
            pair[0].record(gpu.stream)
            body()
            pair[1].record(gpu.stream)
            events.append(pair)
        gpu.synchronize()
        return Spread(tuple(get_elapsed_time(*pair) / 1e3 for pair in events))


def _gpu(backend: Backend) -> Any:
    """The Gpu of a CUDA backend; the protocol of backends does not know it."""
    return backend.gpu  # type: ignore[attr-defined]


def measure(backend: Backend, probe: int | None = None, side: int | None = None, repeats: int = 10) -> Peaks:
    """Both ceilings. probe: bytes to read; side: of the square matrices; by default as large as the memory allows.

    The best of the repeats counts: a ceiling is what was reached once. Raises DeviceError if the reading kernel's sum
    is wrong.
    """
    if backend.name == "cuda":
        free = _gpu(backend).free_memory()
        probe = probe or min(_MOST_PROBE, free // 4)
        side = side or (8192 if free > 4 << 30 else 4096)
        read = _read_gpu(backend, probe, repeats)
    else:
        side = side or 1024
        read = _read_host(probe or _HOST_PROBE, repeats)
    return Peaks(read, _product(backend, side, repeats), dtype_name(backend.dtype))


def _read_gpu(backend: Backend, probe: int, repeats: int) -> float:
    gpu = _gpu(backend)
    blocks = 8 * gpu.limits.sms
    y = backend.zeros((blocks,), DTYPES["u32"])
    with gpu:
        function = gpu.function("peaks.cu", "read_sum", 0)

    def read(x: Array) -> None:
        with gpu:
            function((blocks, 1, 1), (256, 1, 1), (x, y, np.int64(x.nbytes // 16)), 0)

    pieces = 3 * blocks * _RUN + 5  # each block reads several runs, the last one not to its end
    words = np.random.default_rng(0).integers(0, 2**32, 4 * pieces, dtype=np.uint32)
    read(backend.upload(words))
    if int(backend.download(y).sum(dtype=np.uint32)) != int(words.sum(dtype=np.uint32)):
        raise DeviceError("the kernel of peaks.cu computes a wrong sum, so its time would mean nothing")
    x = backend.load_weight(random_weight("probe", (probe // 16 * 16 // backend.dtype.itemsize,), backend.dtype))
    read(x)
    return float(x.nbytes / min(seconds(backend, lambda: read(x), repeats).values))


def _read_host(probe: int, repeats: int) -> float:
    x = random_weight("probe", (probe // 4,), DTYPES["f32"]).array()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        x.max()  # reads at the memory's speed; a sum would be bound by its arithmetic
        taken.append(time.perf_counter() - began)
    return x.nbytes / min(taken)


def _product(backend: Backend, side: int, repeats: int) -> float:
    def matrix(name: str) -> Array:
        return backend.load_weight(random_weight(name, (side, side), backend.dtype))

    x, w = matrix("x"), matrix("w")

    def body() -> None:
        backend.call(OPS["linear"], (x, w), {"U": "T"})

    body()
    return 2 * side**3 / min(seconds(backend, body, repeats).values)


# ---- where it was measured -------------------------------------------------------------------------------------------
def environment(backend: Backend) -> dict[str, str]:
    """Device, driver, versions and date, by stable names."""
    found = {"device": backend.describe(), "dtype": dtype_name(backend.dtype)}
    if backend.name == "cuda":
        from ..backends.cuda import driver

        library = driver.load_driver()
        found["driver"] = _driver() or "unknown"
        if library is not None:
            found["driver_cuda"] = driver.dotted(driver.driver_version(library))
        found["cupy"] = _version(("cupy-cuda12x", "cupy-cuda13x", "cupy"))
    found["cuplama"] = _version(("cuplama",))
    found["numpy"] = np.__version__
    found["python"] = platform.python_version()
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found


def _driver() -> str | None:
    """The NVIDIA driver's version, where Linux tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    m = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return m[1] if m else None


def _version(packages: Sequence[str]) -> str:
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def header(facts: Mapping[str, str]) -> str:
    """The environment as one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
