"""The kernels of bias.cu, launched as the CUDA backend launches them before a product of cuBLAS, on the emulator: no op
of the registry has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuplama.backends.cuda import planning
from cuplama.dtypes import DTYPES
from cuplama.lab.check import Executor
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.binding import bind

CASES = [
    (name, T, U, n, m)
    for name, T, U in (
        ("linear", "f32", "f32"),
        ("linear", "f16", "f16"),
        ("linear", "bf16", "f32"),
        ("linear_add", "bf16", "f32"),
        ("linear_add", "f32", "f32"),
    )
    for n, m in ((9, 256), (11, 7), (10, 300))
]


@pytest.mark.parametrize(("name", "T", "U", "n", "m"), CASES)
def test_biases_are_prepared_for_cublas(name: str, T: str, U: str, n: int, m: int) -> None:
    check_biases(EmulatedDevice(), name, T, U, n, m)


def check_biases(executor: Executor, name: str, T: str, U: str, n: int, m: int) -> None:
    """Every launch that may come before a product of the op ``name`` with a bias: x[n,8] and b[m] in T, y[n,m] in U."""
    op, case = OPS[name], dict(n=n, m=m, k=8, b=True, U=U)
    workload = case_workload(op, case, T)
    arrays = dict(zip((s.name for s in op.signature.ins), workload.ins, strict=True))
    b = arrays["b"].astype(np.float32)
    residual = arrays.get("a")
    launched = set()
    for plan in planning.library_plans(workload.bind()):
        for launch in plan.launches:
            if len(launch.grid) > 1:  # fewer blocks than rows, as where there are more than 65535
                launch = replace(launch, grid=(launch.grid[0], 4))
            call = workload.bind()
            call.arrays["y"] = np.full((n, m), np.nan, DTYPES[U])
            scratch = {key: np.full(shape, np.nan, DTYPES[dtype]) for key, (shape, dtype) in plan.scratch.items()}
            executor.launch(bind(launch, call, scratch))
            out = scratch["bias"] if scratch else call.arrays["y"]
            want = b if scratch else np.broadcast_to(b, (n, m)) + (0 if residual is None else residual)
            np.testing.assert_array_equal(out, want.astype(DTYPES[U]), launch.kernel)
            launched.add(launch.kernel)
    assert launched == {"bias.cu:fill_rows", *(["bias.cu:cast_bias"] if T != U else [])}
