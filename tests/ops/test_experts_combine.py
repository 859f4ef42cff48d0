"""The experts' products and their weighted sum in one launch, on the emulator: held to what rounds nothing to T, with
blocks of several tiles, rings that are gone through more than once, and warps without a chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.nvrtc import compile_program
from cuplama.lab.check import check, expected, planned, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload, described_workload
from cuplama.ops import OPS, experts_combine
from cuplama.ops.abstract import abstract
from cuplama.ops.experts_combine import expert_linear_combine
from cuplama.ops.launch import Device, Plan
from cuplama.ops.linear import PRODUCT_TOLERANCE
from cuplama.ops.op import Call

SHORT_OF_MEMORY = Device(sms=2, shared=64 << 10)  # rings are shorter than what goes through them
SMALL = Device(arch=80, sms=2, shared=166912)  # a block has several tiles of columns
ONE = ["experts_combine_mma.cu"]
TIGHT = replace(expert_linear_combine, tolerance=PRODUCT_TOLERANCE)


def case(dtype: str = "bf16", seed: int = 0, **sizes: Any) -> Workload:
    return case_workload(TIGHT, {"b": True, "a": True, **sizes}, dtype, seed)


def files(workload: Workload, device: Device) -> list[str]:
    return [launch.file for launch in planned(workload, workload.ins, device, abstract)[0]]


def run(workload: Workload, device: Device = SMALL, of: list[str] = ONE) -> None:
    """Held to the reference, and computed by the kernels of these files."""
    assert files(workload, device) == of
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice(device)), expected(workload, arrays))


@pytest.mark.parametrize("n", range(1, 5))
def test_rows_that_share_experts_and_rows_that_do_not(n: int) -> None:
    """Of 23 experts each row has three, or all rows have the same three."""
    for chosen in (23, 3):
        run(case(n=n, s=3, E=23, m=37, k=136, chosen=chosen), SMALL)


@pytest.mark.parametrize("left_out", ["a", "b"])
def test_what_is_added_may_be_left_out(left_out: str) -> None:
    run(case("f16", n=2, s=2, E=5, m=41, k=72, **{left_out: False}))


@pytest.mark.parametrize("n", [1, 4])
def test_a_ring_is_gone_through_more_than_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_combine, "_WARPS", (4,))
    monkeypatch.setattr(experts_combine, "_MAX_DEPTH", 3)
    workload = case(n=n, s=4, E=9, m=70, k=712)
    (launch,) = planned(workload, workload.ins, SMALL, abstract)[0]
    assert launch.expression.endswith(", 4, 3>")
    run(workload)


def test_small_rings_have_fewer_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_combine, "_MAX_RING_BYTES", 38 << 10)
    workload = case(n=4, s=2, E=9, m=40, k=328)
    (launch,) = planned(workload, workload.ins, SMALL, abstract)[0]
    assert launch.expression == "expert_linear_combine_mma<bf16, 4, 4, 3>"
    run(workload)


def test_warps_without_a_chunk_and_blocks_without_a_column() -> None:
    run(case(n=1, s=1, E=2, m=7, k=40), Device(arch=80, sms=9, shared=166912))
    run(case(n=1, s=2, E=2, m=150, k=64), Device(arch=80, sms=2, shared=166912))


def test_an_expert_that_all_rows_chose_and_those_of_one() -> None:
    """Expert 3 is everybody's; each row has one to itself; the rest nobody chose."""
    n, E = 4, 11
    workload = case(n=n, s=2, E=E, m=48, k=200)
    x, w, _, _, weights, b, a = workload.arrays()
    experts = np.array([[3, 4 + row % 7] if row % 2 else [4 + row % 7, 3] for row in range(n)], np.int32)
    pairs = OPS["sort_pairs"].reference(experts, E=E)
    run(replace(workload, ins=(x, w, *pairs, weights, b, a)))


def test_rows_do_not_meet() -> None:
    """What is too large in one row does not show in another, which chose other experts."""
    workload = case(n=2, s=2, E=4, m=32, k=136)
    x, w, _, _, weights, b, a = workload.arrays()
    assert x is not None
    x[2:] = 3e38
    pairs = OPS["sort_pairs"].reference(np.array([[0, 1], [2, 3]], np.int32), E=4)
    workload = replace(workload, ins=(x, w, *pairs, weights, b, a))
    (y,) = run_guarded(workload, workload.arrays(), EmulatedDevice(SMALL))
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = expected(workload, workload.arrays())[0]
    np.testing.assert_allclose(y[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert not np.isfinite(y[1]).all()


# ---- what was chosen is read ahead --------------------------------------------------------------------------------


def _granted(call: Call, device: Device) -> Plan:
    """The plan with every kernel reading ahead that can, however long its ring."""
    assert expert_linear_combine.kernels is not None
    plan = expert_linear_combine.kernels(call, device)
    launches = (
        replace(l, constants={**l.constants, "ahead": 1}) if "ahead" in l.constants else l for l in plan.launches
    )
    return replace(plan, launches=tuple(launches))


def _aheads(workload: Workload) -> list[int]:
    """What the kernels that can read ahead are told."""
    found = planned(workload, workload.ins, SHORT_OF_MEMORY, abstract)[0]
    pairs = (pair for l in found for pair in zip(l.prototype.parameters, l.args, strict=True))
    return [int(value) for parameter, value in pairs if parameter.name == "ahead"]


AHEAD = [(n, m, k) for n in (1, 2) for m, k in ((37, 72), (150, 712))]  # short slices of k, and long ones


def check_reading_ahead(executor: EmulatedDevice, n: int, m: int, k: int) -> None:
    """A kernel that reads ahead what was chosen gives what it gives else."""
    given = case(n=n, s=3, E=7, m=m, k=k, W="mxfp4")
    granted = replace(given, op=replace(expert_linear_combine, kernels=_granted))
    assert _aheads(given) == [0]
    assert _aheads(granted) == [1]
    arrays = given.arrays()
    (y,), (z,) = (run_guarded(workload, arrays, executor) for workload in (given, granted))
    np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize(("n", "m", "k"), AHEAD)
def test_reading_ahead_changes_nothing(n: int, m: int, k: int) -> None:
    check_reading_ahead(EmulatedDevice(SHORT_OF_MEMORY), n, m, k)
    granted = replace(expert_linear_combine, kernels=_granted)
    run(
        replace(case(n=n, s=3, E=7, m=m, k=k, W="mxfp4"), op=granted),
        SHORT_OF_MEMORY,
        ["experts_packed.cu", "route.cu"],
    )


# ---- what is computed in two launches --------------------------------------------------------------------------------

TWO = ["experts.cu", "route.cu"]


@pytest.mark.parametrize(
    ("dtype", "device", "of"),
    [
        ("f32", Device(), TWO),
        ("f16", Device(75, 40, 65536), TWO),
        ("bf16", Device(deterministic=True), ["experts_many_wgmma.cu", "route.cu"]),
    ],
)
def test_what_the_kernel_does_not_take_is_two_launches(dtype: str, device: Device, of: list[str]) -> None:
    workload = replace(case(dtype, n=3, s=2, E=5, m=24, k=72), op=expert_linear_combine)
    run(workload, device, of)


@pytest.mark.parametrize("n", [1, 5])
def test_packed_weights_are_two_launches(n: int) -> None:
    workload = replace(case(n=n, s=3, E=5, m=70, k=328, W="mxfp4"), op=expert_linear_combine)
    run(workload, SMALL, ["experts_packed.cu", "route.cu"])


def test_more_than_four_rows_are_two_launches() -> None:
    workload = replace(case(n=5, s=2, E=5, m=24, k=72), op=expert_linear_combine)
    run(workload, replace(SMALL, sms=108), ["experts_mma.cu", "route.cu"])
    run(workload, SMALL, ["experts_many_mma.cu", "route.cu"])


def test_only_chosen_experts_are_counted() -> None:
    few, more = (case(n=8, s=2, E=7, m=40, k=136, chosen=chosen).call.nbytes() for chosen in (2, 5))
    assert more - few == 3 * 2 * 40 * (136 + 1)


# ---- room beside the kernel ahead ------------------------------------------------------------------------------------
# Of a multiprocessor of Hopper: bytes of shared memory, in units of 128, and registers, in units of 8 for each lane.
_SHARED, _REGISTERS = 228 << 10, 64 << 10
_GPT_OSS = dict(s=4, E=32, m=2880, k=2880, b=True, W="mxfp4")


def _taken(op: str, sizes: dict[str, Any]) -> tuple[int, int]:
    """Bytes of shared memory and registers that a block of the op's first kernel takes of a multiprocessor."""
    workload = described_workload(OPS[op], sizes, "bf16")
    launch = planned(workload, workload.ins, Device(), abstract)[0][0]
    used = compile_program(launch.file, [launch.expression], 90).resources[launch.expression]
    assert used.spills == 0
    return -(-(launch.shared + used.shared + 1024) // 128) * 128, -(-used.registers // 8) * 8 * launch.block[0]


@pytest.mark.slow  # it compiles both kernels for a GPU
@pytest.mark.parametrize("n", [1, 2])
def test_a_block_that_reads_ahead_has_its_place_beside_one_of_the_kernel_ahead(n: int) -> None:
    up = _taken("expert_linear_clamped_swiglu", dict(n=n, alpha=1.702, limit=7.0, **_GPT_OSS))
    down = _taken("expert_linear_combine", dict(n=n, a=True, **_GPT_OSS))
    assert up[0] + down[0] <= _SHARED
    assert up[1] + down[1] <= _REGISTERS
    assert down[0] > 80 << 10  # which is nearly all ring


@pytest.mark.parametrize(("n", "ahead"), [(1, 2), (2, 2), (5, 0)])
def test_only_few_rows_are_few_enough_for_that(n: int, ahead: int) -> None:
    plan = expert_linear_combine.kernels
    assert plan is not None
    call = described_workload(expert_linear_combine, dict(n=n, a=True, **_GPT_OSS), "bf16").bind()
    assert len(plan(call, Device()).launches[0].ahead) == ahead
    assert not plan(call, Device(arch=80, sms=108, shared=166912)).launches[0].ahead  # where no kernel starts early
