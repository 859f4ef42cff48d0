"""TODO: lab.emulation."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.cuda.toolkit import shared_limit
from ..errors import DeviceError
from ..folders import source_folder
from ..ops.abstract import abstract
from ..ops.launch import Device
from .cases import Case
from .check import WrongResultError, check, planned

__all__ = ["Emulator", "emulator_missing"]


class Emulator:
    """Runs kernels on the CPU, by the emulator of the checkout's tests. Raises DeviceError where there is none."""

    def __init__(self, arch: int = 90) -> None:
        missing = emulator_missing()
        if missing:
            raise DeviceError(missing)
        root = str(_checkout())
        if root not in sys.path:
            sys.path.insert(0, root)
        from ..simt import emulator

        self._emulator = emulator
        self._devices = [Device(arch=a, shared=shared_limit(a)) for a in dict.fromkeys((arch, min(arch, 80)))]

    def outputs(self, case: Case, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
        """The case's outputs, from poisoned memory. Raises WrongResultError for a fault that is found."""
        ins = [None if x is None else x.copy() for x in arrays]
        device = self.device(case)
        launches, outs = planned(case, ins, device, _poisoned)
        try:
            for launch in launches:
                self._emulator.run(launch, arch=device.arch)
        except self._emulator.KernelFault as e:
            raise WrongResultError(f"{case.label}: {_brief(str(e))}") from None
        return outs

    def check(self, case: Case) -> None:
        """Raises WrongResultError."""
        arrays = case.arrays()
        check(case, arrays, self.outputs(case, arrays))

    def prepare(self, cases: Iterable[Case]) -> None:
        """Compile what the cases launch, many at a time. Raises WrongResultError with the first complaint."""
        wanted: dict[int, dict[tuple[str, str], None]] = {}
        for case in cases:
            device = self.device(case)
            for launch in planned(case, case.ins, device, abstract)[0]:
                wanted.setdefault(device.arch, {})[launch.file, launch.expression] = None
        try:
            for arch, kernels in wanted.items():
                self._emulator.precompile(list(kernels), arch=arch)
        except self._emulator.KernelFault as e:
            raise WrongResultError(_brief(str(e))) from None

    def device(self, case: Case) -> Device:
        """The device that a case is planned for: one whose kernels use nothing that is not emulated.

        Raises DeviceError if there is none.
        """
        for device in self._devices:
            files = {launch.file for launch in planned(case, case.ins, device, abstract)[0]}
            if not any(self._foreign(file) for file in files):
                return device
        raise DeviceError(f"{case.op.name}: its kernels use instructions that are not emulated")

    def _foreign(self, file: str) -> bool:
        text = (source_folder() / file).read_text(encoding="utf-8")
        return any(f"{name}(" in text or f"{name}<" in text for name in self._emulator.NOT_EMULATED)


def _brief(text: str) -> str:
    """A fault as it is; of a compiler's messages only the first error."""
    lines = text.splitlines()
    if not lines[0].startswith("compile-error"):
        return text
    return " ".join([lines[0], *[line.strip() for line in lines[1:] if "error: " in line][:1]])


def _poisoned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.full(shape, 0x5A5A5A5A if dtype.kind in "iu" else np.nan, dtype)


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent


def emulator_missing() -> str:
    """Why kernels cannot be run on the CPU here; empty if they can."""
    if not (_checkout() / "tests" / "simt" / "emulator.py").is_file():
        return "without a GPU, kernels are run by the emulator in tests/, which is in a checkout only"
    return "" if shutil.which("g++") else "without a GPU, kernels are run by an emulator that needs g++"
