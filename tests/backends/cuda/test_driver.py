"""The driver called directly: programmatic dependent launch by the bytes that cuLaunchKernelEx is given."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda import driver
from cuplama.backends.cuda.driver import PdlLaunch, compute_capability, cuda_available, dotted, driver_version
from tests.fakes import Driver

# From cuda.h of CUDA 12: CUlaunchConfig is six unsigned of grid and block, the bytes of shared memory, padding, the
# stream, the attributes and how many they are; CUlaunchAttribute is its id, padding and a union of 64 bytes.
_CONFIG, _ATTRIBUTE = "3I3II4xQQI4x", "i4x64s"
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_STREAM, _FUNCTION, _ARRAY = 0x7000_0000_1000, 0x7000_0000_2000, 0x7000_0000_3000


class _LaunchDriver:
    """A libcuda that copies what it is told to launch. answer: what cuLaunchKernelEx returns; 0 is success."""

    def __init__(self, answer: int = 0, sizes: tuple[int, ...] = ()) -> None:
        self._answer, self._sizes = answer, sizes
        self.config: tuple[Any, ...] = ()
        self.attribute: tuple[Any, ...] = ()
        self.arguments: list[bytes] = []
        self.function: Any = None
        self.extra: Any = ""

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: Any) -> int:  # noqa: N802
        address = ctypes.addressof(config._obj)
        self.config = struct.unpack(_CONFIG, ctypes.string_at(address, struct.calcsize(_CONFIG)))
        self.attribute = struct.unpack(_ATTRIBUTE, ctypes.string_at(self.config[8], struct.calcsize(_ATTRIBUTE)))
        self.arguments = [ctypes.string_at(p, size) for p, size in zip(arguments, self._sizes, strict=True)]
        self.function, self.extra = function.value, extra
        return self._answer


class _Plain:
    """CuPy's function: its address, and a launch of its own."""

    ptr = _FUNCTION

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __call__(self, *launch: Any) -> None:
        self.launches.append(launch)


def _launch(answer: int) -> tuple[_LaunchDriver, _Plain, tuple[Any, ...]]:
    fake, plain = _LaunchDriver(answer, (8, 4, 8, 4)), _Plain()
    array = SimpleNamespace(data=SimpleNamespace(ptr=_ARRAY))
    launch = ((7, 5, 3), (128, 2, 1), (array, np.int32(-9), np.uintp(0), np.float32(0.5)), 49152)
    PdlLaunch(fake, plain, _STREAM)(*launch)  # type: ignore[arg-type]
    return fake, plain, launch


def test_a_dependent_launch_says_grid_block_shared_memory_and_stream() -> None:
    fake, plain, _ = _launch(0)
    *size, stream, _, count = fake.config
    assert size == [7, 5, 3, 128, 2, 1, 49152]
    assert (stream, count, fake.function, fake.extra) == (_STREAM, 1, _FUNCTION, None)
    assert plain.launches == []


def test_a_dependent_launch_carries_the_attribute_and_nothing_else_in_it() -> None:
    fake, _, _ = _launch(0)
    assert fake.attribute == (_PROGRAMMATIC_STREAM_SERIALIZATION, struct.pack("i60x", 1))


def test_arguments_are_passed_by_address_with_the_size_of_their_type() -> None:
    fake, _, _ = _launch(0)
    assert [struct.unpack(f, b)[0] for f, b in zip("QiQf", fake.arguments, strict=True)] == [_ARRAY, -9, 0, 0.5]


@pytest.mark.parametrize("code", [1, 801])
def test_a_launch_that_the_driver_refuses_becomes_an_ordinary_one(code: int) -> None:
    _, plain, launch = _launch(code)
    assert plain.launches == [launch]


def test_the_structures_have_the_sizes_of_cuda_h() -> None:
    fake, _, _ = _launch(0)
    assert (struct.calcsize(_CONFIG), struct.calcsize(_ATTRIBUTE)) == (56, 72)
    assert fake.config[8] % 8 == 0  # the attributes are read in place
    assert (ctypes.sizeof(driver._Config), ctypes.sizeof(driver._Attribute)) == (56, 72)


def test_only_what_keeps_such_edges_launches_early() -> None:
    """Hopper, and a driver whose captured graphs keep them."""
    assert (PdlLaunch.OLDEST_ARCH, PdlLaunch.OLDEST_DRIVER) == (90, 12030)


# ---- whether there is a usable GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "device", "reason"),
    [
        (None, 0, "no NVIDIA driver is installed"),
        (Driver(init=100), 0, "finds no GPU"),
        (Driver(init=804), 0, "does not support this GPU"),
        (Driver(init=3), 0, "cuInit: error 3"),
        (Driver(version=11080), 0, "too old (CUDA 11.8; driver 525"),
        (Driver(version=11990), 0, "too old"),
        (Driver(count=0), 0, "no NVIDIA GPU is visible"),
        (Driver(count=2), 2, "there is no GPU 2 (2 found)"),
        (Driver(arch=74), 0, "too old (sm_74; sm_75"),
    ],
)
def test_why_a_gpu_cannot_be_used(fake: Any, device: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "load_driver", lambda: fake)
    ok, text = cuda_available(device)
    assert not ok
    assert reason in text


@pytest.mark.parametrize("fake", [Driver(), Driver(version=12000), Driver(arch=75), Driver(count=3)])
@pytest.mark.parametrize("found", [True, False])
def test_a_gpu_can_be_used_where_cupy_is_installed(fake: Any, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "load_driver", lambda: fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    ok, text = cuda_available(fake.count - 1)
    assert ok == found
    assert text == ("" if found else "cupy is not installed (pip install cupy-cuda12x)")


def test_what_the_driver_says_of_itself() -> None:
    fake: Any = Driver(version=12090, arch=86)
    assert (driver_version(fake), dotted(12090), compute_capability(fake, 0)) == (12090, "12.9", 86)


@pytest.mark.parametrize(("platform", "name"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_the_driver_is_loaded_by_its_name_on_each_platform(
    platform: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda asked: f"loaded {asked}")
    assert str(driver.load_driver()) == f"loaded {name}"


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert driver.load_driver() is None
    assert cuda_available() == (False, "no NVIDIA driver is installed (libcuda.so.1 not found)")
