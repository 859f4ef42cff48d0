"""A stand-in GPU for the lab: its kernels run on the emulator, and every replay takes 40 microseconds."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.lab import compare, kernel_bench, peaks, timing
from cuplama.lab.timing import Spread
from cuplama.ops.launch import Device
from tests.fakes import FakeGpu, HostCublas
from tests.lab.common import PEAKS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    """A backend whose kernels the emulator runs; every replay takes 40 microseconds."""

    def timed(backend: Any, body: Any, repeats: int) -> Spread:
        body()
        return Spread((40e-6,) * repeats)

    monkeypatch.setattr(timing, "seconds", timed)
    monkeypatch.setattr(kernel_bench, "cache_bytes", lambda backend: 1000)
    monkeypatch.setattr(timing, "_MIN_LAUNCHES", 2)
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    backend.gpu.limits = Device(sms=2)
    function = backend.gpu.function
    monkeypatch.setattr(backend.gpu, "function", lambda file, name, shared, *_: function(file, name, shared))
    monkeypatch.setattr(backend.gpu, "describe", lambda: "a stand-in")
    monkeypatch.setattr(backend.gpu, "event", lambda: SimpleNamespace(synchronize=lambda: None))
    yield backend
    backend._plans.clear()


@pytest.fixture
def command_gpu(gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """The commands find the stand-in as the machine's GPU."""

    def opened(*_: Any, **__: Any) -> CudaBackend:
        return gpu

    for place in ("cuplama.backends.cuda.driver", "cuplama.device"):
        monkeypatch.setattr(f"{place}.cuda_available", lambda device=0: (True, ""))
    monkeypatch.setattr("cuplama.backends.cuda.backend.CudaBackend", opened)
    monkeypatch.setattr(gpu.gpu, "free_memory", lambda: 1 << 34, raising=False)
    monkeypatch.setattr(gpu, "close", lambda: None)
    monkeypatch.setattr(peaks, "measure", lambda backend: PEAKS)
    monkeypatch.setattr(compare, "cache_bytes", lambda backend: 1000)
    return gpu
