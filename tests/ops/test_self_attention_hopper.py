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
from cuplama.ops.self_attention import self_attention_case
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
    return self_attention_case(num_heads, H, D, lengths, window)


def _workload(case: Mapping[str, Any], T: str) -> Workload:
    return case_workload(_op(), case, T, 3)


def _run(workload: Workload, executor: EmulatedDevice) -> np.ndarray[Any, Any]:
    (dx,) = run_guarded(workload, workload.arrays(), executor)
    return dx


# (head size, multiprocessors, lengths, window). Few multiprocessors make many rounds of levels, which go up and down in
# turn.
ROUNDS: tuple[tuple[int, int, list[int], int], ...] = (
    (64, 2, [260, 0, 130], 150),
    (64, 1, [520, 0, 129, 257], 0),
    (128, 4, [520, 0, 129, 257], 0),  # rounds of two levels
    (128, 2, [520, 0, 129, 257], 290),
    (64, 132, [1] * 33 + [130], 0),  # sequences for more than a warp that sorts
)


def check_rounds(executor: EmulatedDevice, D: int, lengths: list[int], window: int) -> None:
    """Judge two query heads of one key head."""
    workload = _workload(_case(2, 1, D, lengths, window), "bf16")
    (want,) = expected(workload, workload.arrays())
    assert relative_error(_run(workload, executor), want) < 3e-3  # p, ds and the result are rounded, 2^-9 each


@pytest.mark.parametrize(
    ("T", "case"),
    [
        ("bf16", _case(2, 1, 128, [33, 0, 65])),
        pytest.param("f16", _case(1, 1, 128, [70], window=20), marks=pytest.mark.slow),
        pytest.param("bf16", _case(3, 1, 64, [130], window=64), marks=pytest.mark.slow),
    ],
)
def test_right_on_the_emulator(T: str, case: Mapping[str, Any]) -> None:
    workload = _workload(case, T)
    check(workload, workload.arrays(), [_run(workload, EmulatedDevice(HOPPER, seed=1))])


@pytest.mark.parametrize(
    ("D", "sms", "lengths", "window"), [ROUNDS[0], *(pytest.param(*r, marks=pytest.mark.slow) for r in ROUNDS[1:])]
)
def test_right_in_any_order_of_blocks(D: int, sms: int, lengths: list[int], window: int) -> None:
    check_rounds(EmulatedDevice(replace(HOPPER, sms=sms), seed=sms), D, lengths, window)


@pytest.mark.slow
def test_the_same_bits_however_threads_run() -> None:
    workload = _workload(_case(1, 1, 128, [260]), "bf16")
    one, other = (_run(workload, EmulatedDevice(replace(HOPPER, sms=2), seed=seed)) for seed in (1, 2))
    assert np.array_equal(one.view(np.uint16), other.view(np.uint16))


@pytest.mark.parametrize(("arch", "T", "D"), [(80, "bf16", 64), (100, "bf16", 128), (90, "f32", 64), (90, "f16", 96)])
def test_leaves_the_rest_to_other_kernels(arch: int, T: str, D: int) -> None:
    workload = case_workload(OPS["self_attention_backward"], _case(1, 1, D, [5]), T, 3)
    assert workload.call.dtypes["T"] == DTYPES[T]
    assert hopper_plan(workload.call, Device(arch)) is None
