"""Rounding to a dtype that keys and values may be stored in."""

from __future__ import annotations

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, E4M3_MAX, dtype_name, narrow

E4M3 = DTYPES["e4m3"]
NUMBERS = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)  # 0 to 448, ascending


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_e4m3_is_the_nearest_number_and_of_two_the_even_one(dtype: str) -> None:
    middle = (NUMBERS[:-1] + NUMBERS[1:]) / 2
    even = np.where(np.arange(126) % 2, NUMBERS[1:], NUMBERS[:-1])
    tiny = 2.0**-20  # float64 goes by way of float32, which keeps that
    for sign in (1, -1):
        for x, wanted in (
            (NUMBERS, NUMBERS),
            (middle, even),
            (middle * (1 + tiny), NUMBERS[1:]),
            (middle * (1 - tiny), NUMBERS[:-1]),
        ):
            found = narrow((sign * x).astype(DTYPES[dtype]), E4M3)
            assert dtype_name(found.dtype) == "e4m3"
            assert np.array_equal(found.astype(np.float64), sign * wanted)


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
def test_what_e4m3_cannot_hold_is_its_largest_number(dtype: str) -> None:
    x = np.array([448, 464, 480, 60000, np.inf, -449, -np.inf, np.nan, -0.0], np.float32).astype(DTYPES[dtype])
    found = narrow(x, E4M3).astype(np.float32)
    wanted = np.array([448, 448, 448, 448, 448, -448, -448, np.nan, -0.0], np.float32)
    np.testing.assert_array_equal(found, wanted)
    assert np.signbit(found[-1])
    assert wanted[0] == E4M3_MAX


def test_other_dtypes_are_cast() -> None:
    x = np.array([1e6, 1 / 3], np.float32)
    assert narrow(x, x.dtype) is x
    assert narrow(x, DTYPES["bf16"])[1] == np.float32(0.333984375)
