"""The slopes of activations where exponentials overflow or differences cancel, which random inputs do not reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, narrow
from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS

_FAR = (0.0, -0.0, 1e-6, -1e-6, 1.5, -1.5, 6.0, -6.0, 12.0, -12.0, 40.0, -40.0, 90.0, -90.0, 200.0, -200.0, 3e4, -3e4)


@pytest.mark.parametrize("T", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("silu_mul_backward", dict(f=len(_FAR))),
        ("gelu_tanh_mul_backward", dict(f=len(_FAR))),
        ("gelu_erf_mul_backward", dict(f=len(_FAR))),
        ("gelu_tanh_backward", dict(f=len(_FAR))),
        ("gelu_erf_backward", dict(f=len(_FAR))),
        ("softcap_backward", dict(d=len(_FAR), cap=2.0)),
    ],
)
def test_far_from_zero(name: str, sizes: dict[str, Any], T: str) -> None:
    op = OPS[name]
    workload = case_workload(op, dict(n=1, **sizes), T)
    far = np.array(_FAR, np.float32)
    x = np.concatenate([far, np.ones_like(far)]) if name.endswith("_mul_backward") else far
    arrays = [narrow(x[None], DTYPES[T]), narrow(np.ones((1, len(far)), np.float32), DTYPES[T])]
    workload = replace(workload, ins=tuple(arrays))
    outs = run_guarded(workload, arrays, EmulatedDevice())
    check(workload, arrays, outs)
    assert np.isfinite(outs[0].astype(np.float32)).all()


def test_softcap_slope_keeps_its_digits() -> None:
    """1 - tanh^2 of 8 is 4.5e-7: taken as that difference in float32 it would have no digit left."""
    op = OPS["softcap_backward"]
    x = np.full((1, 8), 8.0, np.float32)
    workload = case_workload(op, dict(n=1, d=8, cap=1.0), "f32")
    arrays = [x, np.ones_like(x)]
    (dx,) = run_guarded(replace(workload, ins=tuple(arrays)), arrays, EmulatedDevice())
    np.testing.assert_allclose(dx, 1 / np.cosh(8.0) ** 2, rtol=1e-6)
