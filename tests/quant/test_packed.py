"""Packed weights: where each code and scale lies, said once more as a formula, and what the values of quant/ tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.ops.weights import named_segments, stored_bytes, weight_rows
from cuplama.quant.catalog import CATALOG, QUANTISED, random_stored
from cuplama.quant.format import PART_DTYPES
from cuplama.quant.packed import pack, packed
from cuplama.quant.stored import Stack
from cuplama.quant.weight import Weight, as_stored

M, K = 37, 200


def _code(block: np.ndarray[Any, Any], bits: int, row: int, column: int) -> int:
    """The code of an element, by the words of a block: lane 4 r + t, chunk of 16 columns, register, element."""
    words = block.view("<u4")
    lane, chunk, half = 4 * (row % 8) + column % 16 // 4, column // 16, row // 8
    pair, element = column % 4 // 2, column % 2

    def word(i: int) -> int:  # the i-th of the lane's words, in vectors of four
        return int(words[(i // 4 * 32 + lane) * 4 + i % 4])

    register = 2 * pair + half
    if bits == 8:
        return word(2 * chunk + half) >> 8 * (pair + 2 * element) & 255
    if bits == 16:
        return word(4 * chunk + register) >> 16 * element & 0xFFFF
    if bits == 32:
        return word(8 * chunk + 4 * half + 2 * pair + element)
    low = word(chunk) >> (4 * register + 16 * element) & 15
    high = words[256:]
    if bits == 5:
        low |= (int(high[2 * lane + chunk // 4]) >> (4 * (chunk % 4) + register + 16 * element) & 1) << 4
    if bits == 6:
        low |= (int(high[4 * lane + chunk // 2]) >> (8 * (chunk % 2) + 2 * register + 16 * element) & 3) << 4
    return low


@pytest.mark.parametrize("name", list(CATALOG))
def test_a_block_holds_each_code_and_scale_where_the_kernels_look(name: str) -> None:
    form, rng = CATALOG[name], np.random.default_rng(1)
    packing = form.packing
    assert packing is not None
    stored = random_stored(form, M, K, rng)
    data, codes = pack(stored), stored.fields["code"].read()
    assert data.nbytes == packing.nbytes(M, K)
    assert packing.block_bytes % 16 == 0
    blocks = data[: 3 * 2 * packing.block_bytes].reshape(3, 2, packing.block_bytes)
    for row, column in zip(rng.integers(0, 48, 300).tolist(), rng.integers(0, 256, 300).tolist(), strict=True):
        found = _code(blocks[row // 16, column // 128], packing.code.bits, row % 16, column % 128)
        assert found == (codes[row, column] if row < M and column < K else 0), (row, column)
    for part, dtype in packing.parts:
        bits, each, at = stored.fields[part].read(), packing.count(part), packing.offset(part)
        if not packing.group:
            assert np.array_equal(data[blocks.size :].view(np.uint32)[:M], bits[:, 0])
            continue
        size = PART_DTYPES[dtype].itemsize
        for row, group in np.ndindex(*bits.shape):
            block = blocks[row // 16, group // each]
            place = at + size * (group % each * 16 + row % 8 * 2 + row % 16 // 8)
            assert int.from_bytes(block[place : place + size].tobytes(), "little") == bits[row, group], (part, row)


@pytest.mark.parametrize("name", list(QUANTISED))
def test_rows_of_a_quantised_matrix_are_those_of_the_whole(name: str) -> None:
    stored = random_stored(QUANTISED[name], M, K, np.random.default_rng(2), ordered=True)
    numbers = stored.numbers()
    assert numbers.shape == (M, K)
    assert np.isfinite(numbers).all()
    rows = np.array([3, 36, 3, 0])
    assert np.array_equal(weight_rows(stored, rows), numbers[rows])
    assert np.array_equal(weight_rows(stored, slice(5, 9)), numbers[5:9])
    stack = Stack((stored, stored[:4]))
    assert np.array_equal(stack.numbers(), np.concatenate([numbers, numbers[:4]]))
    assert np.array_equal(weight_rows(stack, np.array([38, 2, 40])), numbers[[1, 2, 3]])
    assert np.array_equal(weight_rows(stack, slice(30, 39)), np.concatenate([numbers[30:], numbers[:2]]))
    assert weight_rows(stack, slice(0, 0)).shape == (0, K)


def test_columns_in_an_order_of_their_own_come_back() -> None:
    form, rng = CATALOG["int4 g32"], np.random.default_rng(3)
    ordered = random_stored(form, 5, 96, rng, ordered=True)
    plain = random_stored(form, 5, 96, np.random.default_rng(3)).numbers()
    assert ordered.order is not None
    assert np.array_equal(ordered.numbers()[:, ordered.order], plain)


def test_a_stack_of_plain_and_quantised_parts_is_packed_as_a_whole() -> None:
    rng = np.random.default_rng(4)
    quantised = random_stored(CATALOG["Q6_K"], 20, 128, rng)
    plain = rng.standard_normal((7, 128)).astype(np.float32)
    weight = Weight("w", ("a", "b"), (quantised, plain))
    assert weight.packed
    assert weight.shape == (27, 128)
    whole = packed(weight.stored(DTYPES["bf16"]))
    assert [s.rows for s in whole.segments] == [20, 7]
    assert [s.format.name for s in whole.segments] == ["Q6_K", "bf16"]
    assert weight.device_bytes(DTYPES["bf16"]) == stored_bytes(whole) == sum(s.data.nbytes for s in whole.segments)
    assert [name for name, _ in named_segments("w", whole)] == ["w.0", "w.0.order", "w.1", "w.1.order"]
    assert np.array_equal(as_stored(plain, DTYPES["f32"]).numbers(), plain)
