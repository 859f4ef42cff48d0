"""Small arrays in one buffer."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuplama.engine.input_buffer import InputBuffer


class _Device:
    sent = 0

    def upload(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return array.copy()

    def write(self, array: np.ndarray[Any, Any], host: np.ndarray[Any, Any]) -> None:
        self.sent += 1
        array[...] = host


def test_arrays_go_in_one_transfer() -> None:
    device: Any = _Device()
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(5, dtype=np.int32),
        "b": np.array([2**64 - 1], np.uint64),
        "c": np.eye(3, 4, dtype=np.float32),
    }
    buffer = InputBuffer(device, arrays)
    for name, array in arrays.items():
        assert np.array_equal(buffer.device[name], array)
        assert (buffer.device[name].dtype, buffer.device[name].ctypes.data % 8) == (array.dtype, 0)
    buffer.host["a"][1:3] = 8, 9
    buffer.host["c"][...] = 7
    assert np.array_equal(buffer.device["a"], arrays["a"])
    buffer.send()
    assert device.sent == 1
    assert buffer.device["a"].tolist() == [0, 8, 9, 3, 4]
    assert buffer.device["b"].tolist() == [2**64 - 1]
    assert (buffer.device["c"] == 7).all()
    buffer.close()
    assert buffer.device == {}
