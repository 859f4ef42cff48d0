"""The emulator's products of warpgroups: what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.ops.binding import BoundLaunch
from cuplama.ops.prototypes import prototypes
from cuplama.simt.emulator import run

KERNELS = Path(__file__).resolve().parent / "kernels"


Random = Callable[..., np.ndarray[Any, Any]]


def _random(bfloat: bool) -> Random:
    """Makes arrays of that dtype."""
    dtype = np.dtype(ml_dtypes.bfloat16 if bfloat else np.float16)
    rng = np.random.default_rng(7)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32).astype(dtype)


def _check(kernel: str, *values: object, a: Any, b: Any, d: Any, wanted: Any) -> None:
    """Run an instance of a kernel of warpgroups.cu, by a warpgroup, on d."""
    instance = f"{kernel}<{', '.join(str(v).lower() for v in values)}>"
    arguments = (a.view(np.uint16), b.view(np.uint16), d)
    proto = prototypes("warpgroups.cu", KERNELS)[kernel]
    run(BoundLaunch("warpgroups.cu", instance, (1, 1, 1), (128, 1, 1), 0, arguments, proto), folder=KERNELS)
    np.testing.assert_allclose(d, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "bfloat", "add"), [(16, True, True), (32, False, True), (48, True, False), (64, False, False)]
)
def test_products_with_rows_across_the_sum(n: int, bfloat: bool, add: bool) -> None:
    """d = a b^T, plus d if `add`; else d is not read."""
    random = _random(bfloat)
    a, b, d = random(64, 16), random(n, 16), random(64, n).astype(np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64).T + add * d
    _check("multiply_rows", bfloat, n, add, a=a, b=b, d=d, wanted=wanted)


@pytest.mark.parametrize("bfloat", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_products_of_two_matrices_in_shared_memory(columns: bool, bfloat: bool) -> None:
    """d += a b^T or, with rows of both along the sum, d = a^T b."""
    random = _random(bfloat)
    a, b, d = random(64, 16), random(64, 16), random(64, 64).astype(np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64).T + (not columns) * d
    if columns:
        a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    _check("multiply_square", bfloat, columns, not columns, a=a, b=b, d=d, wanted=wanted)


@pytest.mark.parametrize(("n", "bfloat"), [(64, True), (64, False), (96, False), (128, True)])
def test_sums_of_products_with_rows_along_the_sum(n: int, bfloat: bool) -> None:
    """d += a b, b in panels of 64 columns."""
    random = _random(bfloat)
    a, b, d = random(64, 16), random(16, n), random(64, n).astype(np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64) + d
    _check("add_products", bfloat, n, a=a, b=b, d=d, wanted=wanted)
