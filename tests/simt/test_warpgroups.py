"""The emulator's products of warpgroups: what they compute."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cuplama.ops.binding import BoundLaunch
from cuplama.ops.prototypes import prototypes
from cuplama.simt.emulator import run

KERNELS = Path(__file__).resolve().parent / "kernels"


@pytest.mark.parametrize(
    ("n", "bfloat", "add"), [(16, True, True), (32, False, True), (48, True, False), (64, False, False)]
)
def test_products_with_rows_across_the_sum(n: int, bfloat: bool, add: bool) -> None:
    """d = a b^T, plus d if `add`; else d is not read."""
    dtype = np.dtype(ml_dtypes.bfloat16 if bfloat else np.float16)
    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal(s).astype(np.float32).astype(dtype) for s in ((64, 16), (n, 16)))
    d = rng.standard_normal((64, n)).astype(np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64).T + add * d
    kernel = f"multiply_rows<{str(bfloat).lower()}, {n}, {str(add).lower()}>"
    arguments = (a.view(np.uint16), b.view(np.uint16), d)
    proto = prototypes("warpgroups.cu", KERNELS)["multiply_rows"]
    run(BoundLaunch("warpgroups.cu", kernel, (1, 1, 1), (128, 1, 1), 0, arguments, proto), folder=KERNELS)
    np.testing.assert_allclose(d, wanted, rtol=1e-6, atol=1e-6)
