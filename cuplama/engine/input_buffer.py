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
from ..ops import OPS

__all__ = ["InputBuffer"]

_WORD = 4  # bytes of what is changed singly
_CHANGES = 64  # words that the smallest message of changes has room for
# Words of one message. A run of more is copied as it is: a word that is set singly is two on its way, place and value.
_MAX_WORDS = 4096
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
        self._changed: list[tuple[int, int]] = []  # (first word, number of words) of what is to be sent
        self.device: dict[str, Array] = self._views(self._buffer)

    def _views(self, buffer: Array) -> dict[str, Any]:
        found = {}
        for name, (at, shape, dtype) in self._places.items():
            found[name] = buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return found

    def send(self) -> None:
        """Copy the host's arrays to the device, in order with what is queued; they may change as soon as it returns."""
        self._backend.write(self._buffer, self._bytes)

    def change(self, name: str, row: int, first: int = 0, count: int | None = None) -> None:
        """A row of ``host[name]`` has changed, or ``count`` of its elements from ``first`` on: ``send_changes`` sends
        them."""
        at, shape, dtype = self._places[name]
        width = math.prod(shape[1:])
        begin = at + (row * width + first) * dtype.itemsize
        size = (width - first if count is None else count) * dtype.itemsize
        self._changed.append((begin // _WORD, size // _WORD))

    def send_changes(self) -> None:
        """Copy what has changed to the device, in order with what is queued; the rest stays as the device has it."""
        if not self._changed:
            return
        host, device = self._bytes.view(np.int32), self._buffer.view(np.int32)
        for at, count in (c for c in self._changed if c[1] > _MAX_WORDS):
            self._backend.write(device[at : at + count], host[at : at + count])
        runs = [np.arange(at, at + count) for at, count in self._changed if count <= _MAX_WORDS]
        places = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.intp)
        self._changed.clear()
        for at in range(0, len(places), _MAX_WORDS):
            self._set(device, places[at : at + _MAX_WORDS], host)

    def _set(self, device: Array, places: np.ndarray[Any, Any], host: np.ndarray[Any, Any]) -> None:
        size = _CHANGES << max(0, (len(places) - 1) // _CHANGES).bit_length()  # few sizes: each is planned once
        sent = np.full((2, size), -1, np.int32)
        sent[0, : len(places)], sent[1, : len(places)] = places, host[places]
        both = self._backend.upload(sent)
        self._backend.call(OPS["set_words"], (device, both[0], both[1]), {})

    def close(self) -> None:
        """Drop the device arrays."""
        self.device.clear()
        del self._buffer
