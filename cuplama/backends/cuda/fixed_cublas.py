"""Products of cuBLASLt in which a row of y does not depend, bit for bit, on how many rows there are.

The library chooses another algorithm for another number of rows, and with it, perhaps, another order of additions. Two
things fix the order. Algorithms that divide a sum among thread blocks are not asked for. Of the others one is taken
only if it gives the bits of a reference: that of the algorithm which the library names for ``REFERENCE_ROWS`` rows.
Both compute the same random numbers, once, when the first product of that kind is planned. Where the library's own
choices for a number of rows fail that, the reference itself computes them.

Two orders of additions show at once, also where sums are rounded to 16 bits: the numbers of a trial cancel, so that
what is left of a sum is its rounding errors.

The library's choice for many rows and its choice for one have the same order on Hopper, as vLLM's batch-invariant mode
found (vllm/model_executor/layers/batch_invariant.py, 2025): there the speed is that of its best algorithms without
divided sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...dtypes import DTYPES
from ...errors import DeviceError
from .cublas import Cublas, Heuristic, Kind, Product

__all__ = ["CANDIDATES", "REFERENCE_ROWS", "FixedCublas"]

REFERENCE_ROWS = 128
"""Rows of x for which the library names the algorithm whose order of additions all products of a kind have. Trials have
as many."""
CANDIDATES = 8
"""Algorithms that the library names for a number of rows, of which the first with the right order is taken."""
_TRIAL_COLUMNS = 256  # of y in a trial, at most
_RESULT_BYTES = REFERENCE_ROWS * _TRIAL_COLUMNS * 4
_ALIGNMENT = 256  # bytes, of each array of a trial
_PERIOD = 100_003  # random numbers that a trial's arrays repeat: a prime, so no two rows of a matrix are equal

Read = Callable[[int, int], "np.ndarray[Any, Any]"]
Write = Callable[[int, "np.ndarray[Any, Any]"], None]


class FixedCublas(Cublas):
    """The library on one device and stream. memory: address of ``room`` bytes for trials.

    read: (offset, size) -> those bytes of the memory, once everything queued before has run; write: (offset, numbers)
    overwrites it from there on. There is no workspace: no algorithm that is taken needs one.
    """

    reduction = 0

    def __init__(self, library: ctypes.CDLL, stream: int, memory: int, room: int, read: Read, write: Write) -> None:
        library.cublasLtMatmulAlgoCheck.argtypes = (ctypes.c_void_p,) * 8
        super().__init__(library, stream, memory, 0)
        self._memory, self._room, self._read, self._write = memory, room - _RESULT_BYTES, read, write
        self._there: tuple[int, int, Kind] | None = None  # the trial whose inputs the memory holds
        self._addresses: dict[str, int] = {}
        self._references: dict[tuple[Any, ...], Heuristic | None] = {}
        self._verdicts: dict[tuple[Any, ...], bool] = {}

    def scaled_product(self, *_: Any, **__: Any) -> None:
        """None: such products round x to 8 bits, and for few rows our kernels do not."""
        return None

    def choose(self, product: Product) -> Heuristic | None:
        """The best algorithm, as cuBLAS sees it, that adds as the reference does; None if there is no reference.

        Raises DeviceError if not even the reference takes the product's sizes.
        """
        if (reference := self.reference(product)) is None:
            return None
        for algorithm in (*self.candidates(product, CANDIDATES), reference):
            if self.alike(product, algorithm, reference):
                return algorithm
        raise DeviceError("no algorithm of cuBLAS adds as for other numbers of rows; deterministic=False needs none")

    def reference(self, product: Product) -> Heuristic | None:
        """The algorithm whose order of additions products of that kind have, whatever their number of rows."""
        (_, m, k), kind = product.sizes, product.kind
        if (m, k, kind) not in self._references:
            usual = self._product(REFERENCE_ROWS, m, k, kind, super().choose)
            self._references[m, k, kind] = usual.algorithm
        return self._references[m, k, kind]

    def alike(self, product: Product, algorithm: Heuristic, reference: Heuristic) -> bool:
        """Whether an algorithm takes the product's sizes and adds in the order of the reference."""
        if not self._takes(product, algorithm):
            return False
        (n, m, k), kind = product.sizes, product.kind
        rows = min(n, REFERENCE_ROWS)
        key = (rows, m, k, kind, _bits(algorithm))
        if key not in self._verdicts:
            same = _bits(algorithm) == _bits(reference)
            self._verdicts[key] = same or self._tried(((rows, algorithm), (REFERENCE_ROWS, reference)), m, k, kind)
        return self._verdicts[key]

    def _takes(self, product: Product, algorithm: Heuristic) -> bool:
        """Whether the library can compute the product so."""
        status = self.library.cublasLtMatmulAlgoCheck(
            self.handle, *product.described, ctypes.byref(algorithm), ctypes.byref(Heuristic())
        )
        return bool(status == 0)

    def _product(self, n: int, m: int, k: int, kind: Kind, choose: Callable[[Product], Heuristic | None]) -> Product:
        return Product(self, n, m, k, kind.T, kind.U, kind.bias, kind.add, m, form=kind.form, choose=choose)

    def _tried(self, trials: Sequence[tuple[int, Heuristic]], m: int, k: int, kind: Kind) -> bool:
        """Whether algorithms, each for a number of rows, give the rows that they have in common the same bits. False if
        one of them cannot be tried."""
        last = DTYPES[kind.U].itemsize
        columns = self._columns(m, k, kind)
        addresses = self._prepared(columns, k, kind)
        common, found = min(rows for rows, _ in trials), []
        for rows, algorithm in trials:
            trial = self._product(rows, columns, k, kind, partial(_given, algorithm))
            if not self._takes(trial, algorithm):
                return False
            trial(**addresses, y=self._memory + self._room)
            found.append(self._read(self._room, common * columns * last))
        return all(np.array_equal(found[0], other) for other in found[1:])

    def _columns(self, m: int, k: int, kind: Kind) -> int:
        """Columns of y in a trial: as many as there is room for rows of w beside x, in half of the memory."""
        row = k * DTYPES[kind.T].itemsize
        fitting = (self._room // 2 - REFERENCE_ROWS * row) // row // 16 * 16
        if fitting < 1:
            raise DeviceError(f"k = {k} is too long for a trial of cuBLAS's algorithms")
        return min(m, _TRIAL_COLUMNS, fitting)

    def _prepared(self, columns: int, k: int, kind: Kind) -> dict[str, int]:
        """The addresses of a trial's inputs, which are written unless they are there already."""
        shapes = {"x": (REFERENCE_ROWS, k), "w": (columns, k)}
        shapes |= {"b": (1, columns)} if kind.bias else {}
        shapes |= {"c": (REFERENCE_ROWS, columns)} if kind.add else {}
        if self._there != (columns, k, kind):
            self._addresses.clear()
            self._there = (columns, k, kind)
            at = 0
            for name, (rows, width) in shapes.items():
                numbers = _cancelling(rows, width, kind.T, name == "w") if name in "xw" else _tiny(rows, width, kind.U)
                self._write(at, numbers)
                self._addresses[name] = self._memory + at
                at += -(-numbers.nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._addresses


def _cancelling(rows: int, k: int, T: str, negative: bool) -> np.ndarray[Any, Any]:
    """Normal numbers, each twice in its row, at places that matrices of that width have in common; the second with the
    other sign if ``negative``. So the sums of a product of two such matrices are 0 but for what rounding adds."""
    rng, half = np.random.default_rng(k), k // 2
    some = np.resize(rng.standard_normal(_PERIOD, np.float32).astype(DTYPES[T]), rows * half).reshape(rows, half)
    order, numbers = rng.permutation(k), np.zeros((rows, k), DTYPES[T])
    numbers[:, order[:half]] = some
    numbers[:, order[half : 2 * half]] = -some if negative else some
    return numbers


def _tiny(rows: int, width: int, U: str) -> np.ndarray[Any, Any]:
    """Numbers as small as what rounding leaves of a sum, so that they hide nothing of that."""
    return (np.random.default_rng(width).standard_normal((rows, width), np.float32) * 2.0**-18).astype(DTYPES[U])


def _given(algorithm: Heuristic, _: Product) -> Heuristic:
    return algorithm


def _bits(algorithm: Heuristic) -> bytes:
    """What tells an algorithm from others: the library's own description of it."""
    return bytes(algorithm.algorithm)
