"""The small inputs of a pass in one buffer on the device, so that one transfer sets them all.

A transfer costs the host a call, however few bytes it moves, and a decode step has more than ten inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import Array

__all__ = ["InputBuffer"]

_ALIGNMENT = 16  # bytes: every array begins at a multiple of it, because kernels may read 16 bytes at a time


class InputBuffer:
    """Copies of ``arrays``, of any shapes and dtypes, in one buffer.

    device: the arrays on the device, by name; host: by the same names, the arrays in host memory that ``send`` copies
    there. Where the device is the host both may share their memory.
    """

    def __init__(self, backend: Backend, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._backend = backend
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        size = 0
        for name, array in arrays.items():
            self._places[name] = (size, array.shape, array.dtype)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._bytes = np.zeros(size, np.uint8)
        self.host: dict[str, np.ndarray[Any, Any]] = self._views(self._bytes)
        for name, array in arrays.items():
            self.host[name][...] = array
        self._buffer = backend.upload(self._bytes)
        self.device: dict[str, Array] = self._views(self._buffer)

    def _views(self, buffer: Array) -> dict[str, Any]:
        found = {}
        for name, (at, shape, dtype) in self._places.items():
            found[name] = buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return found

    def send(self) -> None:
        """Copy the host's arrays to the device, in order with what is queued; they may change as soon as it returns."""
        self._backend.write(self._buffer, self._bytes)

    def close(self) -> None:
        """Drop the device arrays."""
        self.device.clear()
        del self._buffer
