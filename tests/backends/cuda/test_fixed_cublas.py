"""Products with one order of additions: which algorithms of a stand-in for cuBLASLt are taken."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.cublas import Product
from cuplama.backends.cuda.fixed_cublas import CANDIDATES, REFERENCE_ROWS, FixedCublas
from cuplama.dtypes import DTYPES
from cuplama.errors import DeviceError

from .test_cublas import _NAMES, Library, _array

ROOM = 1 << 22
IN_ORDER, SPLIT, GEMV, WIDE = 1, 2, 3, 4  # the first byte of an algorithm


class Orders(Library):
    """A library whose algorithms add in different orders: all in sequence, but for ``SPLIT`` and ``GEMV``, which have
    two sums for halves of k. ``GEMV`` takes a single row, ``WIDE`` at least 128.

    named: (rows) -> the algorithms that the heuristic names, best first; ran: the algorithm of each product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.named: Any = lambda rows: [IN_ORDER]
        self.ran: list[int] = []
        p = ctypes.c_void_p
        self._define("cublasLtMatmulAlgoCheck", self._check, *(p,) * 8)

    def _choose(
        self, handle: int, desc: int, a: int, b: int, c: int, d: int, preference: int, asked: int, out: int, count: int
    ) -> int:
        about = self.alive[preference]
        assert (about["MAX_WORKSPACE_BYTES"], about["REDUCTION_SCHEME_MASK"]) == (0, 0)
        named = self.named(self.alive[b]["columns"])[:asked]
        for i, number in enumerate(named):
            ctypes.memmove(out + 96 * i, bytes([number] * 64), 64)
            ctypes.c_int.from_address(out + 96 * i + 72).value = 0
        ctypes.c_int.from_address(count).value = len(named)
        return 0

    def _check(self, handle: int, desc: int, a: int, b: int, c: int, d: int, algorithm: int, result: int) -> int:
        rows, number = self.alive[b]["columns"], ctypes.string_at(algorithm, 1)[0]
        return 15 if (number == GEMV and rows > 1) or (number == WIDE and rows < 128) else 0

    def _matmul(
        self, handle: int, desc: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int, c: int,
        c_layout: int, d: int, d_layout: int, algorithm: int, workspace: int, size: int, stream: int,
    ) -> int:  # fmt: skip
        assert size == 0
        number = ctypes.string_at(algorithm, 1)[0]
        self.ran.append(number)

        def matrix(address: int, layout: int) -> np.ndarray[Any, Any]:
            about = self.alive[layout]
            return _array(address, (about["columns"], about["ld"]), DTYPES[_NAMES[about["type"]]])[:, : about["rows"]]

        w, x, y = matrix(a, a_layout).astype(np.float32), matrix(b, b_layout).astype(np.float32), matrix(d, d_layout)
        cuts = 2 if number in (SPLIT, GEMV) else 1
        total = np.zeros(y.shape, np.float32)
        for part in np.array_split(np.arange(w.shape[1]), cuts):
            terms = x[:, None, part] * w[None, :, part]
            total += np.add.accumulate(terms, -1, dtype=np.float32)[..., -1]
        if ctypes.c_float.from_address(beta).value:
            total += matrix(c, c_layout).astype(np.float32)
        if self.alive[desc].get("EPILOGUE") == 4:
            total += _array(self.alive[desc]["BIAS_POINTER"], (y.shape[1],), y.dtype).astype(np.float32)
        assert np.isfinite(total).all()
        y[...] = total
        return 0


class Memory:
    """Host memory for trials, that begins at a multiple of 256."""

    def __init__(self) -> None:
        whole = np.zeros(ROOM + 256, np.uint8)
        start = -whole.ctypes.data % 256
        self.bytes, self.written = whole[start : start + ROOM], 0

    def read(self, at: int, size: int) -> np.ndarray[Any, Any]:
        return self.bytes[at : at + size].copy()

    def write(self, at: int, numbers: np.ndarray[Any, Any]) -> None:
        self.written += 1
        self.bytes[at : at + numbers.nbytes] = numbers.view(np.uint8).reshape(-1)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def library() -> Orders:
    return Orders()


@pytest.fixture
def cublas(library: Orders, memory: Memory) -> FixedCublas:
    return FixedCublas(library, 0x51, memory.bytes.ctypes.data, ROOM, memory.read, memory.write)  # type: ignore[arg-type]


def _chosen(cublas: FixedCublas, rows: Sequence[int], **kind: Any) -> list[int]:
    """The first bytes of the algorithms for so many rows."""
    found = []
    for n in rows:
        product = cublas.product(n, **{"m": 40, "k": 300, "T": "bf16", "U": "f32", **kind})
        assert isinstance(product, Product)
        assert product.algorithm is not None
        found.append(bytes(product.algorithm.algorithm)[0])
    return found


@pytest.mark.parametrize("kind", [{}, {"U": "bf16", "bias": True}, {"add": True, "bias": True}, {"T": "f32"}], ids=str)
def test_the_first_that_adds_in_order_is_taken(library: Orders, cublas: FixedCublas, kind: dict[str, Any]) -> None:
    library.named = lambda rows: {1: [GEMV, SPLIT, IN_ORDER]}.get(rows, [WIDE, SPLIT] if rows >= 128 else [SPLIT, 7])
    assert _chosen(cublas, (1, 5, 100, 128, 1000), **kind) == [IN_ORDER, 7, 7, WIDE, WIDE]
    library.named = lambda rows: [SPLIT, 9]
    assert _chosen(cublas, (1, 5, 1000), **kind) == [9, 9, 9]  # the reference stays as it was


def test_where_the_library_names_no_such_the_reference_serves(library: Orders, cublas: FixedCublas) -> None:
    library.named = lambda rows: [IN_ORDER] if rows == REFERENCE_ROWS else [GEMV, SPLIT]
    assert _chosen(cublas, (1, 9, REFERENCE_ROWS, 500)) == [IN_ORDER] * 4


def test_where_nothing_takes_the_rows_it_is_said(library: Orders, cublas: FixedCublas) -> None:
    library.named = lambda rows: [WIDE] if rows == REFERENCE_ROWS else [SPLIT]
    with pytest.raises(DeviceError, match=r"y\[3,40\].*: no algorithm of cuBLAS adds as for other numbers of rows"):
        _chosen(cublas, (3,))


def test_without_a_reference_there_is_no_product_of_any_size(library: Orders, cublas: FixedCublas) -> None:
    library.named = lambda rows: [] if rows == REFERENCE_ROWS else [IN_ORDER]
    assert [cublas.product(n, 40, 300, "bf16", "f32") for n in (1, 9)] == [None, None]


def test_each_algorithm_is_tried_once(library: Orders, cublas: FixedCublas, memory: Memory) -> None:
    asked = []

    def named(rows: int) -> list[int]:
        asked.append(rows)
        return [SPLIT, *range(7, 7 + CANDIDATES)]

    library.named = named
    for _ in range(2):
        assert _chosen(cublas, (200, 1000)) == [SPLIT] * 2  # SPLIT is the reference here
    assert (library.ran, memory.written) == ([], 0)
    assert asked.count(REFERENCE_ROWS) == 1
    library.named = lambda rows: [IN_ORDER]
    for _ in range(2):
        assert _chosen(cublas, (1, 200, 1000)) == [SPLIT] * 3
    assert library.ran == [IN_ORDER, SPLIT] * 2  # for one row, and for 128 and more
    assert memory.written == 2  # x and w


def test_long_sums_are_tried_in_what_room_there_is(library: Orders, cublas: FixedCublas) -> None:
    library.named = lambda rows: [IN_ORDER] if rows == REFERENCE_ROWS else [SPLIT]
    assert _chosen(cublas, (4,), m=20, k=3000) == [IN_ORDER]
    with pytest.raises(DeviceError, match="k = 200000 is too long"):
        _chosen(cublas, (64,), k=200_000)


def test_8_bit_products_are_not_given(cublas: FixedCublas) -> None:
    assert cublas.scaled_product(128, 128, 128, "row", "f32", fast=True) is None  # type: ignore[func-returns-value]
