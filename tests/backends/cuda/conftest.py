"""Kernels of our own, to compile with NVRTC, and the backend of a GPU that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.folders import source_folder

_TEST_KERNELS = """
#include "common.cuh"
template <typename T, int N> __global__ void plain(const T* x, T* y, int n) {
    __shared__ float tile[N];
    tile[threadIdx.x] = to_float(x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = from_float<T>(tile[N - 1 - threadIdx.x]);
}
template <int N> __global__ void __launch_bounds__(1024, 2) greedy(const float* x, float* y, int n) {
    float a[N];
#pragma unroll
    for (int i = 0; i < N; i++) a[i] = x[i * n + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) y[i * n + threadIdx.x] = a[i] * a[(i + 1) % N] * a[i * 7 % N];
}
"""


@pytest.fixture
def nvrtc() -> None:
    """Skips what compiles where CuPy, which brings the binding of NVRTC, is not installed."""
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs cupy for NVRTC")


@pytest.fixture
def sources(nvrtc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels of our own in the place of cuda_src/."""
    (tmp_path / "common.cuh").write_text((source_folder() / "common.cuh").read_text())
    (tmp_path / "test.cu").write_text(_TEST_KERNELS)
    for module in ("toolkit", "nvrtc"):
        monkeypatch.setattr(f"cuplama.backends.cuda.{module}.source_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def real() -> Iterator[CudaBackend]:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    backend = CudaBackend("f32")
    yield backend
    backend.close()
