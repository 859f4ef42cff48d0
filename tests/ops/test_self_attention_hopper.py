"""The backward of self_attention on Hopper's warpgroup products: many tiles, rounds, heads and windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.lab.check import check, expected, relative_error, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device
from cuplama.ops.op import Call, Op
from cuplama.ops.self_attention_hopper import hopper_plan

HOPPER = Device(90)


def _op() -> Op:
    """The op with this plan, whatever others it has."""

    def kernels(call: Call, device: Device) -> Any:
        plan = hopper_plan(call, device)
        assert plan is not None
        return plan

    return replace(OPS["self_attention_backward"], kernels=kernels)


def _case(num_heads: int, H: int, D: int, lengths: list[int], window: int = 0) -> Mapping[str, Any]:
    return dict(
        n=sum(lengths), b=len(lengths), num_heads=num_heads, H=H, D=D, lengths=lengths, window=window, scale=D**-0.5,
    )  # fmt: skip


def _workload(case: Mapping[str, Any], T: str) -> Workload:
    return case_workload(_op(), case, T, 3)


def _run(workload: Workload, sms: int = HOPPER.sms, seed: int = 0) -> np.ndarray[Any, Any]:
    (dx,) = run_guarded(workload, workload.arrays(), EmulatedDevice(Device(90, sms=sms), seed=seed))
    return dx


@pytest.mark.parametrize(
    ("T", "case"),
    [
        ("bf16", _case(2, 1, 128, [33, 0, 65])),
        ("f16", _case(3, 1, 64, [130], window=64)),
        pytest.param("f16", _case(1, 1, 128, [70], window=20), marks=pytest.mark.slow),
        pytest.param("bf16", _case(2, 2, 64, [129, 1]), marks=pytest.mark.slow),
    ],
)
def test_right_on_the_emulator(T: str, case: Mapping[str, Any]) -> None:
    workload = _workload(case, T)
    check(workload, workload.arrays(), [_run(workload, seed=1)])


@pytest.mark.parametrize(("D", "sms", "window"), [(64, 1, 0), (64, 2, 150), (128, 3, 0), (128, 2, 290)])
@pytest.mark.slow
def test_right_in_any_order_of_blocks(D: int, sms: int, window: int) -> None:
    """Few multiprocessors make many rounds of levels, which go up and down in turn."""
    workload = _workload(_case(2, 1, D, [520, 0, 129, 257], window), "bf16")
    (want,) = expected(workload, workload.arrays())
    assert relative_error(_run(workload, sms, seed=sms), want) < 3e-3  # p, ds and the result are rounded, 2^-9 each


def test_the_same_bits_however_threads_run() -> None:
    workload = _workload(_case(1, 1, 128, [260]), "bf16")
    assert np.array_equal(_run(workload, 2, seed=1).view(np.uint16), _run(workload, 2, seed=2).view(np.uint16))


@pytest.mark.parametrize(("arch", "T", "D"), [(80, "bf16", 64), (100, "bf16", 128), (90, "f32", 64), (90, "f16", 96)])
def test_leaves_the_rest_to_other_kernels(arch: int, T: str, D: int) -> None:
    workload = case_workload(OPS["self_attention_backward"], _case(1, 1, D, [5]), T, 3)
    assert workload.call.dtypes["T"] == DTYPES[T]
    assert hopper_plan(workload.call, Device(arch)) is None
