"""Products with packed weights of experts, on the emulator: every format, several tiles of an expert, slices.

Where codes become numbers inside the tiles of many pairs is test_experts_many.py's; here they are unpacked.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.nvrtc import compile_ptx
from cuplama.lab.check import check, expected, planned, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS, experts_packed
from cuplama.ops.abstract import abstract
from cuplama.ops.experts import packed_ways
from cuplama.ops.experts_packed import Ways
from cuplama.ops.launch import Device
from cuplama.quant.catalog import CATALOG
from cuplama.quant.packed import packed
from cuplama.quant.stored import ExpertStack

SMALL = Device(arch=80, sms=3, shared=166912)  # each block has units of several experts
FEW, MANY = ["experts_packed.cu"], ["unpack.cu", "experts_many_mma.cu"]
KNOBS = {"expert_linear_clamped_swiglu": dict(alpha=1.702, limit=7.0)}
PRODUCTS = [name for name in OPS if name.startswith("expert_linear") and name != "expert_linear_combine"]


def case(op: str, dtype: str = "bf16", seed: int = 0, **sizes: Any) -> Workload:
    return case_workload(OPS[op], {"b": True, **KNOBS.get(op, {}), **sizes}, dtype, seed)


def to_scratch(op: str, dtype: str = "bf16", **sizes: Any) -> Workload:
    """A case whose weights are unpacked if it has many pairs."""
    given = case(op, dtype, **sizes)
    return replace(given, op=packed_ways(given.op, Ways(in_tiles=False)))


def run(workload: Workload, files: list[str], device: Device = SMALL) -> None:
    """Held to the reference, and computed by the kernels of these files."""
    launches = planned(workload, workload.ins, device, abstract)[0]
    assert [launch.file for launch in launches] == files
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice(device)), expected(workload, arrays))


SHORT = ("mxfp4", "int8")  # formats of the short tests
NAMES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in CATALOG]


@pytest.mark.parametrize("name", NAMES)
def test_every_format(name: str) -> None:
    """Columns that end within a block, one row of x and several, tiles of one expert and of many."""
    for n in (1, 3):
        run(case("expert_linear_silu_mul", n=n, s=3, E=5, m=48, k=328, W=name), FEW)


def streamed(op: str, dtype: str = "bf16", rows: int | None = None, **sizes: Any) -> Workload:
    """A case that is streamed however many pairs it has, with up to so many in a tile."""
    given = case(op, dtype, **sizes)
    return replace(given, op=packed_ways(given.op, Ways(streamed=1 << 20, streamed_rows=rows)))


def rows_of(workload: Workload, device: Device = SMALL) -> int:
    """The pairs of a tile that the launch is compiled for."""
    (launch,) = planned(workload, workload.ins, device, abstract)[0]
    found = re.search(r", [A-Z_]+, (\d+), ", launch.expression)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("name", "n", "op"),
    [
        ("mxfp4", 29, "expert_linear_clamped_swiglu"),
        ("mxfp4", 20, "expert_linear"),
        ("int4 g128", 40, "expert_linear_silu_mul"),
        ("Q4_K", 57, "expert_linear_gelu_tanh_mul"),
        ("Q4_K", 13, "expert_linear"),
        ("fp8", 9, "expert_linear_silu_mul"),
        ("int8", 35, "expert_linear"),
        ("Q6_K", 30, "expert_linear_silu_mul"),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_block_serves_more_than_eight_pairs(name: str, n: int, op: str, dtype: str) -> None:
    """Tiles that are full and that end within eight pairs or behind them, of two experts; an odd number of units."""
    workload = streamed(op, dtype, 16, n=n, s=1, E=3, m=48, k=392, chosen=2, W=name)
    assert rows_of(workload) == 16
    run(workload, FEW)


@pytest.mark.parametrize(("n", "E", "rows"), [(8, 2, 8), (9, 1, 16), (32, 1, 16), (16, 16, 8), (4, 1, 4)])
def test_tiles_have_as_many_rows_as_pairs_are_likely(n: int, E: int, rows: int) -> None:
    assert rows_of(streamed("expert_linear", n=n, s=1, E=E, m=16, k=128, W="mxfp4")) == rows
    assert rows_of(streamed("expert_linear", "f32", n=n, s=1, E=E, m=16, k=128, W="mxfp4")) == min(rows, 8)


@pytest.mark.parametrize("n", [1, 11])
@pytest.mark.parametrize("op", ["expert_linear", "expert_linear_silu_mul"])
def test_blocks_without_twins(monkeypatch: pytest.MonkeyPatch, op: str, n: int) -> None:
    monkeypatch.setattr(experts_packed, "TWINS", 1)
    for name in ("mxfp4", "int4 g128"):
        run(streamed(op, n=n, s=1, E=1, m=48, k=392, W=name), FEW)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("f16", marks=pytest.mark.slow), "f32"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_every_activation(op: str, dtype: str) -> None:
    run(case(op, dtype, n=5, s=2, E=4, m=32, k=200, W="mxfp4", chosen=3), FEW)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("name", "twins"), [("int4 g128", 2), ("mxfp4", 2), ("fp8", 1), ("Q4_K", 2), ("mxfp4", 1)])
def test_a_compiler_for_gpus_leaves_the_products_in(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int, twins: int
) -> None:
    """NVRTC drops loops that g++ keeps, where pragmas stand behind conditions without braces: sums were nowhere."""
    monkeypatch.setattr(experts_packed, "TWINS", twins)
    workload = streamed("expert_linear", "bf16", rows, n=rows, s=1, E=1, m=16, k=128, W=name)
    (launch,) = planned(workload, workload.ins, Device(arch=90), abstract)[0]
    ptx = compile_ptx(launch.file, [launch.expression], 90)
    loops = ptx[ptx.index("cp.async.wait_group") :]  # over blocks: for 16 rows and for 8 of them
    assert loops.count("mma.sync") == 8 * twins * (3 if rows == 16 else 1)
    assert all("st.shared" in loop for loop in loops.split("cp.async.wait_group")[1:])


def test_rows_that_end_within_a_block() -> None:
    run(case("expert_linear", n=2, s=2, E=5, m=23, k=136, W="int4 g128"), FEW)


def test_more_pairs_of_an_expert_than_a_tile_has() -> None:
    run(case("expert_linear_silu_mul", n=21, s=1, E=6, m=32, k=136, W="mxfp4", chosen=2), FEW)


def test_a_block_without_a_share() -> None:
    run(case("expert_linear", n=1, s=1, E=2, m=16, k=128, W="mxfp4"), FEW, Device(arch=80, sms=40))


def test_of_long_rows_a_tile_has_fewer() -> None:
    small = Device(arch=86, sms=2, shared=101376)
    workload = case("expert_linear", n=8, s=1, E=2, m=16, k=14336, b=False, W="mxfp4")
    (launch,) = planned(workload, workload.ins, small, abstract)[0]
    assert "NO_ACT, 2, " in launch.expression
    run(workload, FEW, small)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_many_pairs_are_multiplied_with_unpacked_numbers(dtype: str) -> None:
    files = MANY if dtype == "bf16" else ["unpack.cu", "experts.cu"]
    run(to_scratch("expert_linear_silu_mul", dtype, n=70, s=1, E=2, m=32, k=72, W="mxfp4"), files)


def test_halves_that_begin_within_a_block_are_unpacked_expert_by_expert() -> None:
    run(case("expert_linear_silu_mul", n=3, s=2, E=3, m=11, k=72, W="fp8"), ["unpack.cu"] * 3 + MANY[1:])


def test_unpacked_experts_go_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_packed, "_SLICE_BYTES", 2 * 32 * 72 * 2)
    run(to_scratch("expert_linear_clamped_swiglu", n=180, s=1, E=5, m=16, k=72, W="mxfp4", chosen=4), 3 * MANY)


def test_a_deterministic_device_has_one_way_for_any_number_of_rows() -> None:
    device = Device(arch=80, sms=3, shared=166912, deterministic=True)
    run(case("expert_linear", n=1, s=2, E=3, m=16, k=72, W="mxfp4"), MANY, device)


def test_other_gpus() -> None:
    run(case("expert_linear_silu_mul", "f16", n=3, s=2, E=4, m=16, k=1100, W="int4 g64"), FEW, Device(75, 2, 65536))


def test_an_expert_is_a_whole_number_of_blocks() -> None:
    workload = case("expert_linear", n=1, s=1, E=3, m=23, k=136, b=False, W="int8")
    w = workload.ins[1]
    assert isinstance(w, ExpertStack)
    assert w.shape == (3, 23, 136)
    assert np.array_equal(w.numbers()[2], w[2].numbers())
    (segment,), (described,) = packed(w).segments, w.segments
    assert segment.rows == described.rows == 3 * 32
    assert segment.data.nbytes == described.data.nbytes


def test_only_the_blocks_of_chosen_experts_are_counted() -> None:
    few, more = (case("expert_linear", n=9, s=2, E=7, m=48, k=128, b=False, W="mxfp4", chosen=c) for c in (2, 5))
    assert more.call.nbytes() - few.call.nbytes() == 3 * 3 * 1088
