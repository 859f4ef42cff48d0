"""Kernels of the lab on a machine without a GPU: planned as for one, run by the emulator (``cuplama/simt``)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backends.cuda.toolkit import shared_limit
from ..dtypes import Array
from ..errors import DeviceError
from ..folders import source_folder
from ..ops.abstract import abstract
from ..ops.binding import BoundLaunch
from ..ops.launch import Device
from ..ops.weights import segments_of
from ..quant.packed import packed
from ..simt import emulator
from .check import Arrays, Checker, Outputs, WrongResultError, planned, run_guarded
from .workloads import Workload

__all__ = ["EmulatedDevice", "Emulator", "emulator_missing"]


class EmulatedDevice:
    """The ``Executor`` that runs launches on NumPy arrays, on the CPU.

    device: what launches are planned for; check: whether every memory access is looked at; seed: of the order in which
    threads run.
    """

    def __init__(self, device: Device | None = None, check: bool = True, seed: int = 0) -> None:
        self.device, self._check, self._seed = device or Device(), check, seed

    def upload(self, array: Array) -> Array:
        return array if segments_of(array) is None else packed(array)

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def launch(self, bound: BoundLaunch) -> None:
        emulator.run(bound, check=self._check, seed=self._seed, arch=self.device.arch)


class Emulator:
    """Checks workloads on the CPU. Raises DeviceError where there is no C++ compiler."""

    def __init__(self, arch: int = 90) -> None:
        if missing := emulator_missing():
            raise DeviceError(missing)
        self._devices = [Device(arch=a, shared=shared_limit(a)) for a in dict.fromkeys((arch, min(arch, 80)))]
        self._checker = Checker(self.outputs, prepare=self.prepare)

    def outputs(self, workload: Workload, arrays: Arrays) -> Outputs:
        """The workload's outputs, from poisoned memory. Raises WrongResultError for a fault that is found."""
        try:
            return run_guarded(workload, arrays, EmulatedDevice(self.device(workload)))
        except emulator.KernelFault as e:
            raise WrongResultError(f"{workload.label}: {_brief(str(e))}") from None

    def check(self, workload: Workload) -> None:
        """Raises WrongResultError. The first workload of an op also has the op's cases in float32 checked."""
        self._checker.check(workload)

    def prepare(self, workloads: Sequence[Workload]) -> None:
        """Compile what the workloads launch, many at a time. Raises WrongResultError with the first complaint."""
        wanted: dict[int, dict[tuple[str, str], None]] = {}
        for workload in workloads:
            device = self.device(workload)
            for launch in planned(workload, workload.ins, device, abstract)[0]:
                wanted.setdefault(device.arch, {})[launch.file, launch.expression] = None
        try:
            for arch, kernels in wanted.items():
                emulator.precompile(list(kernels), arch=arch)
        except emulator.KernelFault as e:
            raise WrongResultError(_brief(str(e))) from None

    def device(self, workload: Workload) -> Device:
        """The device that a workload is planned for: one whose kernels use nothing that is not emulated.

        Raises DeviceError if there is none.
        """
        for device in self._devices:
            files = {launch.file for launch in planned(workload, workload.ins, device, abstract)[0]}
            if not any(_foreign(file) for file in files):
                return device
        raise DeviceError(f"{workload.op.name}: its kernels use instructions that are not emulated")


def _foreign(file: str) -> bool:
    text = (source_folder() / file).read_text(encoding="utf-8")
    return any(f"{name}(" in text or f"{name}<" in text for name in emulator.NOT_EMULATED)


def _brief(text: str) -> str:
    """A fault as it is; of a compiler's messages only the first error."""
    lines = text.splitlines()
    if not lines[0].startswith("compile-error"):
        return text
    return " ".join([lines[0], *[line.strip() for line in lines[1:] if "error: " in line][:1]])


def emulator_missing() -> str:
    """Why kernels cannot be run on the CPU here, in one line; empty if they can."""
    return "" if shutil.which("g++") else "without a GPU kernels run on an emulator, which needs the C++ compiler g++"
