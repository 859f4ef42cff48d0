"""Products of few rows with packed weights (cuda_src/linear_packed.cu), on the emulator: every format, every kernel."""

from __future__ import annotations

from typing import Any

import pytest

from cuplama.lab.check import check, expected, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device
from cuplama.quant.catalog import CATALOG

SMALL = Device(sms=2)  # each block has several tiles


def run(op: str, dtype: str, device: Device = SMALL, seed: int = 0, **case: Any) -> None:
    workload = case_workload(OPS[op], {"b": False, "U": "T", "eps": 1e-5, **case}, dtype, seed)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice(device)), expected(workload, arrays))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", CATALOG)
def test_every_format(name: str, dtype: str) -> None:
    """Rows and columns that end within a block, one row of x and several."""
    for n in (1, 3):
        run("linear", dtype, W=name, n=n, m=70, k=328)
