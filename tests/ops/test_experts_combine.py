"""The experts' products and their weighted sum in one launch, on the emulator: held to what rounds nothing to T, with
blocks of several tiles, rings that are gone through more than once, and warps without a chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.lab.check import check, expected, planned, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS, experts_combine
from cuplama.ops.abstract import abstract
from cuplama.ops.experts_combine import TUNING, expert_linear_combine
from cuplama.ops.launch import Device, Plan
from cuplama.ops.linear import PRODUCT_TOLERANCE
from cuplama.ops.op import Call
from cuplama.quant.catalog import CATALOG

SMALL = Device(arch=80, sms=2, shared=166912)  # a block has several tiles of columns
ONE, PACKED = ["experts_combine_mma.cu"], ["experts_combine_packed.cu"]
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


@pytest.mark.parametrize("n", range(1, 9))
def test_rows_that_share_experts_and_rows_that_do_not(n: int) -> None:
    """Of 23 experts each row has three, or all rows have the same three."""
    for chosen in (23, 3):
        run(case(n=n, s=3, E=23, m=37, k=136, chosen=chosen), SMALL)


@pytest.mark.parametrize("left_out", ["a", "b"])
def test_what_is_added_may_be_left_out(left_out: str) -> None:
    run(case("f16", n=2, s=2, E=5, m=41, k=72, **{left_out: False}))


@pytest.mark.parametrize("n", [1, 5])
def test_a_ring_is_gone_through_more_than_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_combine, "TUNING", replace(TUNING, warps=4, depth=3))
    workload = case(n=n, s=4, E=9, m=70, k=712)
    (launch,) = planned(workload, workload.ins, SMALL, abstract)[0]
    assert launch.expression.endswith(", 4, 3>")
    run(workload)


def test_small_rings_have_fewer_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_combine, "TUNING", replace(TUNING, ring=40 << 10))
    workload = case(n=8, s=2, E=9, m=40, k=328)
    (launch,) = planned(workload, workload.ins, SMALL, abstract)[0]
    assert launch.expression == "expert_linear_combine_mma<bf16, 8, 4, 3>"
    run(workload)


def test_warps_without_a_chunk_and_blocks_without_a_column() -> None:
    run(case(n=1, s=1, E=2, m=7, k=40), Device(arch=80, sms=9, shared=166912))
    run(case(n=1, s=2, E=2, m=150, k=64), Device(arch=80, sms=2, shared=166912))


def test_an_expert_that_all_rows_chose_and_those_of_one() -> None:
    """Expert 3 is everybody's; each row has one to itself; the rest nobody chose."""
    n, E = 6, 11
    workload = case(n=n, s=2, E=E, m=48, k=200)
    x, w, _, _, weights, b, a = workload.arrays()
    experts = np.array([[3, 4 + row % 7] if row % 2 else [4 + row % 7, 3] for row in range(n)], np.int32)
    pairs = OPS["sort_pairs"].reference(experts, E=E)
    run(replace(workload, ins=(x, w, *pairs, weights, b, a)))


@pytest.mark.parametrize("form", [{}, {"W": "mxfp4"}], ids=["plain", "mxfp4"])
def test_rows_do_not_meet(form: dict[str, Any]) -> None:
    """What is too large in one row does not show in another, which chose other experts."""
    workload = case(n=2, s=2, E=4, m=32, k=136, **form)
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


# ---- packed weights --------------------------------------------------------------------------------------------------

SHORT = ("mxfp4", "int8")  # formats of the short tests
NAMES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in CATALOG]


@pytest.mark.parametrize("name", NAMES)
def test_every_format(name: str) -> None:
    """One row of x and several, columns of w that end within a packed block, blocks of several units."""
    for n in (1, 3):
        workload = case(n=n, s=3, E=5, m=70, k=328, W=name)
        if name in ("f16", "f32"):  # numbers that bf16 does not hold: the kernel rounds them to it
            workload = replace(workload, op=expert_linear_combine)
        run(workload, SMALL, PACKED)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_packed_rows_that_share_experts_and_rows_that_do_not(n: int) -> None:
    for chosen in (17, 2):
        run(case("f16", n=n, s=2, E=17, m=24, k=136, W="mxfp4", chosen=chosen), SMALL, PACKED)


def test_teams_that_have_no_expert_and_teams_that_have_several() -> None:
    """Of eight teams with an expert each those of one row have one, those of 6 rows take turns."""
    given: dict[str, Any] = dict(s=2, E=16, m=16, k=200, W="int8 g128")
    for workload, teams in ((case(n=6, **given, chosen=2), 8), (case(n=6, **given), 8)):
        assert _constants(workload)["TEAMS"] == teams
        run(workload, SMALL, PACKED)


def _constants(workload: Workload, device: Device = SMALL) -> dict[str, Any]:
    assert workload.op.kernels is not None
    (launch,) = workload.op.kernels(workload.bind(), device).launches
    return dict(launch.constants)


@pytest.mark.parametrize("name", ["mxfp4", "Q4_K"])
def test_rows_of_pairs_go_in_groups_where_shared_memory_is_short(name: str) -> None:
    """With sums of groups, too, which are made anew for each expert."""
    small = Device(arch=86, sms=2, shared=65536)
    workload = case(n=7, s=3, E=12, m=40, k=1096, W=name)
    room = _constants(workload, small)["room"]
    assert 7 <= room < 7 * 3
    run(workload, small, PACKED)


def test_packed_rows_that_do_not_fit_are_two_launches() -> None:
    workload = replace(case(n=8, s=1, E=2, m=16, k=9000, W="mxfp4"), op=expert_linear_combine)
    assert files(workload, Device(arch=86, sms=2, shared=101376)) == ["experts_packed.cu", "route.cu"]


# ---- both ------------------------------------------------------------------------------------------------------------


def _granted(call: Call, device: Device) -> Plan:
    assert expert_linear_combine.kernels is not None
    plan = expert_linear_combine.kernels(call, device)
    return replace(plan, launches=tuple(replace(l, constants={**l.constants, "ahead": 1}) for l in plan.launches))


@pytest.mark.parametrize("W", ["T", "mxfp4"])
@pytest.mark.parametrize("n", [1, 7])
def test_what_was_chosen_may_be_read_ahead(n: int, W: str) -> None:
    """Weights that are asked for ahead are there: the emulator looks at their addresses."""
    form: dict[str, Any] = {} if W == "T" else {"W": W}
    workload = case(n=n, s=3, E=23, m=37, k=136, **form)
    workload = replace(workload, op=replace(TIGHT, kernels=_granted))
    run(workload, SMALL, ONE if W == "T" else PACKED)


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


def test_more_than_eight_rows_are_two_launches() -> None:
    workload = replace(case(n=9, s=2, E=5, m=24, k=72), op=expert_linear_combine)
    run(workload, SMALL, ["experts_mma.cu", "route.cu"])


def test_only_chosen_experts_are_counted() -> None:
    few, more = (case(n=8, s=2, E=7, m=40, k=136, chosen=chosen).call.nbytes() for chosen in (2, 5))
    assert more - few == 3 * 2 * 40 * (136 + 1)
