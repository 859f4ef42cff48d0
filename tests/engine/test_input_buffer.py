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


class _Words(_Device):
    """As a device in order: set_words is called with pairs of places and values."""

    def __init__(self) -> None:
        self.sizes = list[int]()

    def call(self, op: Any, ins: tuple[Any, ...], attrs: dict[str, Any]) -> None:
        assert op.name == "set_words"
        words, places, values = ins
        self.sizes.append(len(places))
        op.reference(words, places, values)


def _changed(count: int) -> tuple[Any, InputBuffer]:
    device: Any = _Words()
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "ids": np.zeros(300, np.int32),
        "seed": np.zeros(5, np.uint64),
        "table": np.zeros((4, count), np.int32),
    }
    return device, InputBuffer(device, arrays)


def test_what_has_changed_goes_alone() -> None:
    device, buffer = _changed(7)
    for array in buffer.host.values():
        array += 1
    buffer.change("ids", 3)
    buffer.change("ids", 3)  # once is enough
    buffer.change("seed", 4)
    buffer.change("table", 2, 1, 3)
    buffer.send_changes()
    found = {name: np.argwhere(array).tolist() for name, array in buffer.device.items()}
    assert found == {"ids": [[3]], "seed": [[4]], "table": [[2, 1], [2, 2], [2, 3]]}
    assert (buffer.device["seed"].tolist(), device.sizes) == ([0, 0, 0, 0, 1], [64])
    buffer.send_changes()
    assert (device.sizes, device.sent) == ([64], 0)
    for row in range(65):
        buffer.change("ids", row)
    buffer.send_changes()
    assert device.sizes == [64, 128]
    assert buffer.device["ids"].tolist() == [1] * 65 + [0] * 235


def test_a_long_row_is_copied_as_it_is() -> None:
    device, buffer = _changed(5000)
    buffer.host["table"][...] = np.arange(20000).reshape(4, 5000)
    buffer.change("table", 2)
    buffer.host["ids"][9] = 7
    buffer.change("ids", 9)
    buffer.send_changes()
    assert (device.sent, device.sizes) == (1, [64])
    assert buffer.device["table"][2].tolist() == list(range(10000, 15000))
    assert not buffer.device["table"][[0, 1, 3]].any()
    assert buffer.device["ids"][9] == 7


def test_many_words_go_in_several_messages() -> None:
    device, buffer = _changed(3000)
    buffer.host["table"][...] = np.arange(1, 12001).reshape(4, 3000)
    for row in range(4):
        buffer.change("table", row)
    buffer.send_changes()
    assert (device.sent, device.sizes) == (0, [4096, 4096, 4096])
    assert np.array_equal(buffer.device["table"], buffer.host["table"])
