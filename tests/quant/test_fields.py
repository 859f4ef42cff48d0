"""Numbers in bytes, read by words or byte by byte, against their bits counted one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.quant.fields import Field, Plane, element_plane, word_plane

BYTES = np.random.default_rng(1).integers(0, 256, 1 << 12).astype(np.uint8)


def by_bits(plane: Plane) -> np.ndarray[Any, Any]:
    """Bit by bit."""
    bits = np.unpackbits(plane.data, bitorder="little").astype(np.uint32)
    at = plane.rows[:, None] + plane.columns
    return sum((bits[at + i] << np.uint32(i) for i in range(plane.bits)), np.zeros(at.shape, np.uint32))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        (1024, None),  # columns within the words of a row
        (None, 1024),  # rows within the words of a column
        (8, 104),  # both within a word: byte by byte
        (24, 768),  # numbers that cross words
    ],
)
@pytest.mark.parametrize("size", [1 << 12, (1 << 12) - 1])
def test_a_place_is_the_sum_of_a_rows_and_a_columns(bits: int, row: int | None, column: int | None, size: int) -> None:
    """row, column: bits from one to the next, None for numbers that lie side by side."""
    rows, columns = (np.arange(12, dtype=np.int64) * (step or bits) for step in (row, column))
    plane = Plane(BYTES[:size], bits, rows, columns)
    assert np.array_equal(plane.read(slice(None)), by_bits(plane))
    chosen = np.array([5, 2, 2])
    assert np.array_equal(plane.read(chosen), by_bits(plane)[chosen])
    assert plane.read(np.array([], np.int64)).shape == (0, 12)


def test_bytes_that_begin_anywhere_in_memory() -> None:
    for offset in range(4):
        data = np.zeros(260, np.uint8)[offset : offset + 256]
        data[:] = BYTES[:256]
        plane = word_plane(BYTES[:256].view(np.int32).reshape(8, 8), 4, 64, along=1)
        moved = Plane(data, plane.bits, plane.rows, plane.columns)
        assert np.array_equal(moved.read(slice(None)), by_bits(plane))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_words(bits: int, along: int, transposed: bool) -> None:
    words = BYTES[:160].view(np.int32).reshape(8, 5)
    each = 32 // bits
    count = words.shape[along] * each - 3
    plane = word_plane(words, bits, count, along=along, transposed=transposed)
    lines = np.moveaxis(words.view(np.uint32), along, 0)
    wanted = np.stack([lines[i // each] >> np.uint32(bits * (i % each)) for i in range(count)]) & ((1 << bits) - 1)
    wanted = np.moveaxis(wanted, 0, along)
    assert np.array_equal(plane.read(slice(None)), wanted.T if transposed else wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("width", [6, 7])
def test_elements(dtype: Any, width: int) -> None:
    array = BYTES[: 8 * width * np.dtype(dtype).itemsize].view(dtype).reshape(8, width)
    assert np.array_equal(element_plane(array).read(slice(None)), array)
    assert np.array_equal(element_plane(array, transposed=True).read(slice(2, 5)), array.T[2:5])


def test_planes_flips_and_sums() -> None:
    low, high = (BYTES[i : i + 64].reshape(8, 8) for i in (0, 64))
    field = Field((element_plane(low), element_plane(high)))
    assert field.bits == 16
    assert np.array_equal(field.read(), low.astype(np.uint32) | high.astype(np.uint32) << 8)
    signed = Field((element_plane(low),), flip=0x80, add=1)
    assert np.array_equal(signed.read(), ((low.astype(np.uint32) ^ 0x80) + 1) & 0xFF)
    assert np.array_equal(
        signed.take_columns(np.array([3, 1])).take_rows(slice(2, 4)).read(), signed.read()[2:4, [3, 1]]
    )
