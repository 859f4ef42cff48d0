"""Products of cuBLASLt in which a row of y does not depend, bit for bit, on how many rows there are.

The library chooses another algorithm for another number of rows, and with it, perhaps, another order of additions. Two
things fix the order. Algorithms that divide a sum among thread blocks are not asked for. Of the others one is taken
only if it gives the bits of a reference: that of the algorithm which the library names for ``REFERENCE_ROWS`` rows.
Both compute the same random numbers, once, when the first product of that kind is planned. Where the library's own
choices for a number of rows fail that, the reference itself computes them.

An order of additions shows at once: of two orders a good part of all float32 sums differ, and of sums that are rounded
to 16 bits one in some hundreds, where a trial has tens of thousands.

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

__all__ = ["CANDIDATES", "REFERENCE_ROWS", "TRIAL_ROWS", "FixedCublas"]

REFERENCE_ROWS = 128
"""Rows of x for which the library names the algorithm whose order of additions all products of a kind have."""
CANDIDATES = 8
"""Algorithms that the library names for a number of rows, of which the first with the right order is taken."""
TRIAL_ROWS, _TRIAL_COLUMNS = 64, 512
"""Rows of x, and of w, that a trial has at most."""
_RESULT_BYTES = TRIAL_ROWS * _TRIAL_COLUMNS * 4
_ALIGNMENT = 256  # bytes, of each array of a trial
_PERIOD = 1_000_003  # random numbers that a trial's arrays repeat: a prime, so no two rows of a matrix are equal

Read = Callable[[int, int], "np.ndarray[Any, Any]"]
Write = Callable[["np.ndarray[Any, Any]"], None]


class FixedCublas(Cublas):
    """The library on one device and stream. memory: address of ``room`` bytes for trials.

    read: (offset, size) -> those bytes of the memory, once everything queued before has run; write: overwrites its
    beginning. There is no workspace: no algorithm that is taken needs one.
    """

    reduction = 0

    def __init__(self, library: ctypes.CDLL, stream: int, memory: int, room: int, read: Read, write: Write) -> None:
        library.cublasLtMatmulAlgoCheck.argtypes = (ctypes.c_void_p,) * 8
        super().__init__(library, stream, memory, 0)
        self._memory, self._room, self._read, self._write = memory, room - _RESULT_BYTES, read, write
        self._filled = ""  # the dtype of the random numbers in the memory
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
        key = (min(n, TRIAL_ROWS), m, k, kind, _bits(algorithm))
        if key not in self._verdicts:
            same = _bits(algorithm) == _bits(reference)
            self._verdicts[key] = same or self._tried(min(n, TRIAL_ROWS), m, k, kind, (algorithm, reference))
        return self._verdicts[key]

    def _takes(self, product: Product, algorithm: Heuristic) -> bool:
        """Whether the library can compute the product so."""
        status = self.library.cublasLtMatmulAlgoCheck(
            self.handle, *product.described, ctypes.byref(algorithm), ctypes.byref(Heuristic())
        )
        return bool(status == 0)

    def _product(self, n: int, m: int, k: int, kind: Kind, choose: Callable[[Product], Heuristic | None]) -> Product:
        return Product(self, n, m, k, kind.T, kind.U, kind.bias, kind.add, m, form=kind.form, choose=choose)

    def _tried(self, rows: int, m: int, k: int, kind: Kind, algorithms: Sequence[Heuristic]) -> bool:
        """Whether the algorithms give the same bits for the same random numbers."""
        itemsize, last = DTYPES[kind.T].itemsize, DTYPES[kind.U].itemsize
        room = self._room // 2 - rows * k * itemsize  # for w: half of what the others leave
        columns = min(m, _TRIAL_COLUMNS, room // (k * itemsize) // 16 * 16)
        if columns < 1:
            raise DeviceError(f"k = {k} is too long for a trial of cuBLAS's algorithms")
        sizes = {"x": rows * k * itemsize, "w": columns * k * itemsize}
        sizes |= {"b": columns * last} if kind.bias else {}
        sizes |= {"c": rows * columns * last} if kind.add else {}
        addresses, at = {"y": self._memory + self._room}, self._memory
        for name, size in sizes.items():
            addresses[name] = at
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._fill(kind.T)
        found = []
        for algorithm in algorithms:
            trial = self._product(rows, columns, k, kind, partial(_given, algorithm))
            if not self._takes(trial, algorithm):
                return False
            trial(**addresses)
            found.append(self._read(self._room, rows * columns * last))
        return all(np.array_equal(found[0], other) for other in found[1:])

    def _fill(self, T: str) -> None:
        """Random numbers of a dtype into the memory, but for the place of results, if they are not there."""
        if self._filled != T:
            some = np.random.default_rng(0).standard_normal(_PERIOD, np.float32).astype(DTYPES[T])
            self._write(np.resize(some, self._room // DTYPES[T].itemsize))
            self._filled = T


def _given(algorithm: Heuristic, _: Product) -> Heuristic:
    return algorithm


def _bits(algorithm: Heuristic) -> bytes:
    """What tells an algorithm from others: the library's own description of it."""
    return bytes(algorithm.algorithm)
