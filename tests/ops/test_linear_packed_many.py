"""Products of packed weights with 9 to 128 rows of x, on the emulator; how they are planned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device
from cuplama.ops.linear_packed_many import many_rows_plan

AMPERE = Device(80, 5, 166912)
HOPPER = Device(90, 5)
SMALL = Device(86, 3, 101376)


def workload(name: str, T: str = "bf16", **case: Any) -> Workload:
    """A case of an op whose kernels are those for many rows alone."""
    op = OPS[name]
    many = replace(op, kernels=partial(many_rows_plan, name))
    found = case_workload(op, {"b": True, "U": "f32", **case}, T)
    return Workload(many, found.arrays(), found.attrs, T)


def run(given: Workload, device: Device) -> None:
    arrays = given.arrays()
    check(given, arrays, run_guarded(given, arrays, EmulatedDevice(device)))


@pytest.mark.parametrize("device", [AMPERE, HOPPER, SMALL], ids=["sm_80", "sm_90", "sm_86"])
@pytest.mark.parametrize(
    "case",
    [
        dict(n=9, m=50, k=128, W="int4 g128", U="T"),
        dict(n=16, m=170, k=904, W="int4 g128 zero", T="f16"),
        dict(n=33, m=300, k=520, W="Q4_K", U="T"),
        dict(n=40, m=270, k=256, W="fp8"),
        dict(n=64, m=130, k=392, W="Q6_K", b=False),
        dict(n=70, m=130, k=256, W="int4 g128 + fp8 g128 ordered"),
    ],
    ids=lambda c: f"{c['n']}-{c['W'].replace(' ', '_')}",
)
def test_products(case: dict[str, Any], device: Device) -> None:
    run(workload("linear", **case), device)
