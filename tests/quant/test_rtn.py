"""Rounding to the nearest: matrices as fields, by pieces of rows, and while they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.quant import rtn
from cuplama.quant.grid import GRIDS
from cuplama.quant.packed import pack
from cuplama.quant.rtn import Rounded, dividing_group, packed_words, round_to_nearest, unpacked_words
from cuplama.quant.stored import Stored

CASES = [("int4", 128), ("int4", 32), ("int4", 0), ("int8", 0), ("int8", 64), ("fp8", 0), ("fp8", 128)]


def _matrix(m: int, k: int, dtype: str = "bf16") -> Any:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((m, k)) * 0.02 * np.exp(rng.standard_normal((m, 1)))).astype(DTYPES[dtype])


@pytest.mark.parametrize(("name", "group"), CASES)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_rounded_matrix_is_what_its_fields_say(name: str, group: int, dtype: str) -> None:
    plain = _matrix(37, 256, dtype)
    stored = Rounded(plain, GRIDS[name], group)
    numbers = stored.numbers()
    assert isinstance(stored, Stored)
    assert np.array_equal(stored.format.decode(stored), numbers)
    assert np.array_equal(stored.settled().numbers(), numbers)
    error = np.linalg.norm(numbers - plain.astype(np.float32)) / np.linalg.norm(plain.astype(np.float32))
    assert error < {"int4": 0.101 if group else 0.14, "int8": 0.009, "fp8": 0.028}[name]
    packing = stored.format.packing
    assert packing is not None
    assert stored.nbytes == sum(f.shape[0] * f.shape[1] * f.bits for f in stored.fields.values()) // 8
    assert pack(stored).nbytes == packing.nbytes(37, 256)


def test_rows_are_quantised_alike_wherever_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _matrix(40, 128)
    whole = Rounded(plain, GRIDS["int4"], 64).numbers()
    monkeypatch.setattr(rtn, "_PIECE", 3 * 128)
    assert np.array_equal(Rounded(plain, GRIDS["int4"], 64).numbers(), whole)
    some = Rounded(plain, GRIDS["int4"], 64)[np.array([7, 3, 39])]
    assert np.array_equal(some.numbers(), whole[[7, 3, 39]])
    assert Rounded(plain, GRIDS["int4"], 64)[5:9].shape == (4, 128)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [8, 21])
def test_words_hold_the_codes_low_bits_first(bits: int, k: int) -> None:
    codes = np.random.default_rng(2).integers(0, 1 << bits, (3, k), dtype=np.uint8)
    words = packed_words(codes, bits)
    each = 32 // bits
    assert words.shape == (3, -(-k // each))
    for column in range(k):
        found = words.view(np.uint32)[:, column // each] >> (column % each * bits) & ((1 << bits) - 1)
        assert np.array_equal(found, codes[:, column])
    assert np.array_equal(unpacked_words(words, bits, k), codes)


def test_the_group_that_divides_a_row() -> None:
    sizes = {4096: 128, 960: 64, 1120: 32, 100: None}
    assert {k: dividing_group(GRIDS["int4"], k) for k in sizes} == sizes
    assert dividing_group(GRIDS["int8"], 100) == dividing_group(GRIDS["fp8"], 4096) == 0


def test_a_matrix_whose_rows_are_not_contiguous() -> None:
    plain = _matrix(64, 48)
    assert np.array_equal(
        Rounded(plain.T, GRIDS["int8"], 0).numbers(), Rounded(plain.T.copy(), GRIDS["int8"], 0).numbers()
    )
    q = round_to_nearest(plain.T, GRIDS["int4"], 32, plain.dtype)
    assert (q.codes.shape, q.scales.shape, q[4:6].numbers().shape) == ((48, 64), (48, 2), (2, 64))
