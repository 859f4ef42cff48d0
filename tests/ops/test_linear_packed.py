"""Products of few rows with packed weights (cuda_src/linear_packed.cu), on the emulator: every format, every kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cuplama.dtypes import dtype_name
from cuplama.lab.check import check, expected, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device, Plan
from cuplama.ops.linear_packed import Tuning, plan_packed
from cuplama.ops.op import Call, Op
from cuplama.ops.weights import segments_of
from cuplama.quant.catalog import CATALOG

SMALL = Device(sms=2)  # each block has several tiles


def run(op: str, dtype: str, device: Device = SMALL, seed: int = 0, tuning: Tuning | None = None, **case: Any) -> None:
    workload = case_workload(OPS[op], {"b": False, "U": "T", "eps": 1e-5, **case}, dtype, seed)
    if tuning is not None:
        workload = replace(workload, op=tuned(op, tuning))
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice(device)), expected(workload, arrays))


def tuned(name: str, tuning: Tuning) -> Op:
    """The op, its launches planned so."""

    def kernels(call: Call, device: Device) -> Plan:
        segments = segments_of(call.arrays["w"])
        assert segments is not None
        silu_mul = name.endswith("_silu_mul")
        constants = {"U": dtype_name(call.dtypes["T"]), "ACT": "SILU_MUL"} if silu_mul else {}
        return plan_packed(name.removesuffix("_silu_mul"), call, device, segments, constants, tuning)

    return replace(OPS[name], kernels=kernels)


FEW = ("int4 g128", "Q4_K")  # formats of the short tests: each takes a second to compile
NAMES = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CATALOG]


@pytest.mark.parametrize("dtype", [pytest.param("f16", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_format(name: str, dtype: str) -> None:
    """Rows and columns that end within a block, one row of x and several."""
    for n in (1, 3):
        run("linear", dtype, W=name, n=n, m=70, k=328)


NORMED = [op for op in OPS if op.startswith(("rms_norm_linear", "layer_norm_linear"))]


@pytest.mark.parametrize("dtype", [pytest.param("f32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("op", [*NORMED, "linear_add"])
def test_every_kernel(op: str, dtype: str) -> None:
    for n in (1, 2, 8):
        run(op, dtype, W="int4 g128", n=n, m=48, k=256, b=n == 2)


@pytest.mark.parametrize("op", ["linear", "rms_norm_linear", "layer_norm_linear"])
def test_sums_in_float32(op: str) -> None:
    """Logits: a normalised row is the sum of two numbers of 16 bits then."""
    for n in (1, 3):
        run(op, "bf16", W="int8 g128", n=n, m=20, k=300, U="f32", b=True)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_long_rows_go_in_phases(n: int) -> None:
    small = Device(sms=1, shared=101376)
    run("linear_add", "f16", small, W="Q4_K", n=n, m=70, k=10240)
    run("rms_norm_linear", "f16", small, W="int4 g64", n=n, m=70, k=4800)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_segments_and_orders(dtype: str) -> None:
    """A stack of formats, some with their columns in an order of their own."""
    for op in ("linear", "rms_norm_linear", "rms_norm_linear_silu_mul"):
        for n in (1, 2):
            run(op, dtype, W="int4 g32 ordered + Q6_K + bf16", n=n, m=72, k=200, b=True)


def test_silu_mul_whose_halves_begin_within_a_block() -> None:
    run("rms_norm_linear_silu_mul", "f16", W="int4 g128", n=2, m=20, k=200)


def test_more_rows_go_eight_by_eight() -> None:
    run("linear", "f16", W="fp8", n=17, m=30, k=128)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shared"), [(75, 65536), (80, 166912), (86, 101376)])
def test_other_gpus(arch: int, shared: int) -> None:
    device = Device(arch=arch, sms=3, shared=shared)
    for name in ("int4 g128 zero", "Q5_K", "fp8"):
        run("linear_add", "f16", device, W=name, n=5, m=60, k=1100)
    run("rms_norm_linear_silu_mul", "f16", device, W="int8", n=8, m=48, k=2200)


@pytest.mark.parametrize("n", [1, 3])
def test_blocks_that_share_k_add_up_their_sums(n: int) -> None:
    """The last to arrive writes y, for all; some may have no part of k."""
    run("linear_add", "bf16", Device(sms=5), tuning=Tuning(part=256), W="fp8", n=n, m=70, k=400, b=True)
    run(
        "rms_norm_linear_silu_mul",
        "bf16",
        Device(sms=4),
        tuning=Tuning(part=512, norm_rows=0),
        W="Q4_K",
        n=n,
        m=32,
        k=700,
    )


def test_a_ring_that_is_filled_behind_x() -> None:
    tuning = Tuning(ahead=1, behind=3, warps=(2, 2))
    for n in (1, 3):
        run("linear_add", "bf16", tuning=tuning, W="int4 g128", n=n, m=40, k=1800)
        run("rms_norm_linear", "bf16", tuning=tuning, W="int4 g128", n=n, m=40, k=450)
