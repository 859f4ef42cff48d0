"""Products of packed weights with 9 to 128 rows of x, on the emulator; how they are planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.launch import Device, Plan
from cuplama.ops.linear_packed_many import MAX_MANY_ROWS, Shape, many_rows_plan
from cuplama.ops.op import Call
from cuplama.quant.catalog import CATALOG
from cuplama.quant.packed import Packed
from cuplama.quant.stored import described

AMPERE = Device(80, 5, 166912)
HOPPER = Device(90, 5)
SMALL = Device(86, 3, 101376)  # the least shared memory of a GPU from sm_80 on
DEVICES = {80: AMPERE, 90: HOPPER, 86: SMALL}


def workload(name: str, shapes: tuple[Shape, ...] = (), T: str = "bf16", **case: Any) -> Workload:
    """A case of an op whose kernels are those for many rows alone."""
    op = OPS[name]

    def kernels(call: Call, device: Device) -> Plan:
        plan = many_rows_plan(name, call, device, shapes)
        assert plan is not None
        return plan

    attrs = {"U": "f32"} if name == "linear" else {}
    return replace(case_workload(op, {"b": True, **attrs, **case}, T), op=replace(op, kernels=kernels))


def run(given: Workload, device: Device, seed: int = 0) -> np.ndarray[Any, Any]:
    arrays = given.arrays()
    (y,) = found = run_guarded(given, arrays, EmulatedDevice(device, seed=seed))
    check(given, arrays, found)
    return y


# Formats whose numbers 16 bits hold.
EXACT = [form for form in CATALOG if form not in ("f32", "nf4")]
FAST = [
    (80, dict(n=16, m=290, k=904, W="int4 g128 zero", T="f16", U="T")),
    (90, dict(n=33, m=300, k=520, W="Q4_K")),
    (90, dict(n=20, m=130, k=328, W="fp8 ordered", b=False, U="T")),
]
SLOW = [
    *((arch, dict(n=24, m=130, k=392, W=f, T="f16" if f == "f16" else "bf16")) for arch in (80, 90) for f in EXACT),
    *((arch, dict(n=n, m=150, k=256, W="int4 g64")) for arch in DEVICES for n in (9, 17, 41, 57, 70, 128)),
    *((arch, dict(n=37, m=150, k=264, W="Q4_K + Q6_K ordered", U="T")) for arch in DEVICES),
    (86, dict(n=64, m=150, k=264, W="bf16")),
    (90, dict(n=40, m=90, k=135, W="int8", U="T")),
    (80, dict(n=40, m=90, k=135, W="int8", U="T")),
]


def label(value: Any) -> str:
    return "-".join(str(v).replace(" ", "_") for v in value.values()) if isinstance(value, dict) else f"sm_{value}"


@pytest.mark.parametrize(("arch", "case"), FAST, ids=label)
def test_products(arch: int, case: dict[str, Any]) -> None:
    run(workload("linear", **case), DEVICES[arch])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), SLOW, ids=label)
def test_more_products(arch: int, case: dict[str, Any]) -> None:
    run(workload("linear", **case), DEVICES[arch])


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 1, 8, 2), Shape(2, 2, 4), Shape(4, 1, 16, 2), Shape(2, 1, 8, wgmma=True), Shape(4, 2, 12, wgmma=True)],
    ids=str,
)
def test_other_shapes(shape: Shape) -> None:
    run(workload("linear", (shape,), n=13, m=330, k=640, W="Q4_1"), HOPPER)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_sum_of_several_blocks_is_the_same_in_any_order(arch: int) -> None:
    """Bands that blocks share are added in the order of k, whichever block arrives last; the residual comes in once."""
    given = workload("linear_add", n=27, m=140, k=640, W="int4 g128")
    first, second = (run(given, DEVICES[arch], seed) for seed in (0, 7))
    assert np.array_equal(first, second)


# ---- plans -----------------------------------------------------------------------------------------------------------
def call(n: int, form: str, T: str = "bf16", m: int = 4096, k: int = 4096, parts: int = 1) -> Call:
    """A product's call, described: nothing is computed."""
    weight = Packed((parts * m, k), tuple(described(m, k, CATALOG[form]) for _ in range(parts)))
    return OPS["linear"].bind([abstract((n, k), DTYPES[T]), weight, None], {"U": T})


def shared_used(constants: Mapping[str, int], block_bytes: int) -> int:
    """Bytes of shared memory that the kernels of linear_packed_many.cu address, counted as they do."""
    rows, depth, warps = 8 * constants["NTILES"], constants["DEPTH"], constants["WARPS"]
    tiles, slices = constants["TILES"], constants.get("SLICES", 1)
    teams = warps // slices
    finish = max((slices - 1) * tiles * constants["NTILES"] * 4 * 32, 16 * 20) * 4 * teams
    ring = depth * teams * tiles * block_bytes
    x = depth * rows * 288 if "SLICES" in constants else 4 * rows * 256 + 1024
    return ring + x + finish


@pytest.mark.parametrize("device", [AMPERE, HOPPER, SMALL, Device(120, 170, 101376)], ids=lambda d: f"sm_{d.arch}")
@pytest.mark.parametrize("form", CATALOG)
def test_every_format_has_a_plan_that_fits(form: str, device: Device) -> None:
    packing = CATALOG[form].packing
    assert packing is not None
    for n in (9, 17, 33, 64, MAX_MANY_ROWS):
        plan = many_rows_plan("linear", call(n, form), device)
        assert plan is not None
        for launch in plan.launches:
            assert shared_used(dict(launch.constants), packing.block_bytes) <= launch.shared <= device.shared - 1024
            assert launch.grid[0] <= device.sms
        assert sum(8 * launch.constants["NTILES"] for launch in plan.launches) >= n


def test_what_goes_another_way() -> None:
    assert many_rows_plan("linear", call(MAX_MANY_ROWS + 1, "int4 g128"), HOPPER) is None
    assert many_rows_plan("linear", call(16, "int4 g128", "f32"), HOPPER) is None
    assert many_rows_plan("linear", call(16, "int4 g128", "f16"), Device(75, 40, 65536)) is None
    assert many_rows_plan("linear", call(16, "int4 g128"), replace(HOPPER, shared=16384)) is None


def test_a_large_weight_is_taken_in_wider_bands_on_hopper() -> None:
    """x is read once for each band, and a part of its sums is left by each multiprocessor."""

    def band(m: int, k: int) -> int:
        plan = many_rows_plan("linear", call(64, "fp8", m=m, k=k), Device(90, 132))
        assert plan is not None
        return int(plan.launches[0].constants["TILES"] * plan.launches[0].constants["WARPS"])

    assert band(28672, 4096) > band(4096, 4096)


def test_segments_and_rows_are_launched_one_after_the_other() -> None:
    plan = many_rows_plan("linear", call(100, "fp8", m=1024, parts=2), HOPPER)
    assert plan is not None
    places = [(lch.names["w"], lch.constants["column"], lch.constants["first"]) for lch in plan.launches]
    assert places == [("w.0", 0, 0), ("w.0", 0, 64), ("w.1", 1024, 0), ("w.1", 1024, 64)]
    assert plan.zeroed == {"arrivals"}
