"""A launch's arguments in device-like memory, and the checks that a device's compiler and driver would make."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .objects import LoadedKernel
from .structures import Region

__all__ = ["Arguments"]

_GUARD = 4096  # bytes between arrays; their base is a multiple of 256, as on the device
_EMPTY = 0x1000  # the address of an array without elements: any access faults
_KINDS = {"f": "f", "i": "i", "u": "ub"}  # kind of a scalar parameter -> kinds of the NumPy scalars that it takes
_Array = np.ndarray[Any, Any]


@dataclass
class _Placed:
    """Arrays that share memory, copied together into device-like memory: 256-byte base, guard zones on both sides.

    low, high: their addresses; shift: what must be added to one to get its address in the copy.
    """

    low: int
    high: int
    copy: np.ndarray[Any, np.dtype[np.uint8]]
    shift: int


class Arguments:
    """The values of a kernel's parameters: arrays as addresses of their copies, scalars as bytes.

    Raises TypeError for what does not fit the parameters.
    """

    def __init__(self, kernel: LoadedKernel, values: Sequence[Any], names: Sequence[str]) -> None:
        args = [_no_null(value) for value in values]
        pointers = [(i, a) for i, a in enumerate(args) if kernel.parameters[i][0] == "p" and a is not None]
        for i, array in pointers:
            _check_array(array, kernel.parameters[i], names[i])
        self._placed = _place([array for _, array in pointers])
        self._written = [a for i, a in pointers if not kernel.parameters[i][1] & 1 and a.nbytes]
        self.values: list[bytes] = []
        regions: list[Region] = []
        for i, (value, parameter) in enumerate(zip(args, kernel.parameters, strict=True)):
            if parameter[0] != "p":
                self.values.append(_scalar(value, parameter, names[i]))
                continue
            address = 0 if value is None else self._address(value)
            self.values.append(int(address).to_bytes(8, "little"))
            if value is not None and value.nbytes:
                regions.append(Region(address, address + value.nbytes, int(not parameter[1] & 1), i))
        # A writable region comes first, so that an array that is passed as const as well can be written.
        self.regions = sorted(regions, key=lambda region: -region.writable)

    def copy_back(self) -> None:
        """Give the caller's arrays what the kernel wrote."""
        for array in self._written:
            ctypes.memmove(_extent(array)[0], self._address(array), array.nbytes)

    def _address(self, array: _Array) -> int:
        low, _ = _extent(array)
        group = next((g for g in self._placed if g.low <= low < g.high), None)
        return low + group.shift if group else _EMPTY


def _check_array(array: Any, parameter: tuple[str, int, int], name: str) -> None:
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise TypeError(f"argument '{name}': a C-contiguous NumPy array is needed, not {type(array).__name__}")
    size, exact, given = parameter[2], parameter[1] & 2, array.dtype.itemsize
    if size != 1 and (size != given if exact else size % given):  # float4* may point to floats
        raise TypeError(f"argument '{name}': elements of {size} bytes are needed, not {array.dtype}")


def _extent(array: _Array) -> tuple[int, int]:
    low = array.__array_interface__["data"][0]
    return low, low + array.nbytes


def _root(array: _Array) -> _Array:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _place(arrays: Sequence[_Array]) -> list[_Placed]:
    """Copies every group of overlapping arrays; a view keeps its offset from its base array modulo 256."""
    groups: list[tuple[int, int, int]] = []
    for array in sorted((a for a in arrays if a.nbytes), key=lambda a: _extent(a)):
        low, high = _extent(array)
        if groups and low < groups[-1][1]:
            groups[-1] = (groups[-1][0], max(high, groups[-1][1]), groups[-1][2])
        else:
            groups.append((low, high, (low - _extent(_root(array))[0]) % 256))
    placed = []
    for low, high, offset in groups:
        memory = np.full(high - low + 2 * _GUARD + 512, 0xFF, np.uint8)
        start = memory.__array_interface__["data"][0]
        inner = (start + _GUARD + 255) // 256 * 256 + offset - start
        copy = memory[inner : inner + high - low]
        ctypes.memmove(start + inner, low, high - low)
        placed.append(_Placed(low, high, copy, start + inner - low))
    return placed


def _no_null(value: Any) -> Any:
    """A null pointer is None, or a NumPy uintp of 0 as ``cuplama.ops.binding.bind`` makes it."""
    return None if isinstance(value, np.uintp) and np.ndim(value) == 0 and value == 0 else value


def _scalar(value: Any, parameter: tuple[str, int, int], name: str) -> bytes:
    kind, _, size = parameter
    scalar = np.asarray(value)
    if scalar.shape != () or scalar.dtype.kind not in _KINDS[kind] or scalar.dtype.itemsize != size:
        raise TypeError(f"argument '{name}': a scalar of kind '{kind}' and {size} bytes is needed, not {scalar.dtype}")
    return scalar.tobytes()
