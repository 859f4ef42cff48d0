"""Many pairs of experts, in tiles: on the emulator plain weights and packed ones in every format, ragged experts, tiles
of every height; and how they are planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.lab.check import planned
from cuplama.lab.workloads import Workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract, attributes
from cuplama.ops.experts import packed_ways
from cuplama.ops.experts_packed import Ways
from cuplama.ops.launch import Device, Launch
from cuplama.ops.route import sort_pairs
from cuplama.ops.weights import expert_rows
from cuplama.quant.catalog import CATALOG
from cuplama.quant.packed import Packed
from cuplama.quant.stored import described
from tests.ops.test_experts_packed import KNOBS, case, run

AMPERE = Device(arch=80, sms=3, shared=166912)
SMALL = Device(arch=86, sms=3, shared=101376)  # the least shared memory of a GPU from sm_80 on
HOPPER = Device(arch=90, sms=3)
MMA, WGMMA = ["experts_many_mma.cu"], ["experts_many_wgmma.cu"]
BOTH = pytest.mark.parametrize(("device", "files"), [(AMPERE, MMA), (HOPPER, WGMMA)], ids=["sm_80", "sm_90"])
SHORT = ("mxfp4", "int4 g128 zero", "fp8")  # formats of the short tests
FORMATS = [name for name, form in CATALOG.items() if form.packing is not None and form.packing.code.bits <= 8]
NAMES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
PRODUCTS = [name for name in OPS if name.startswith("expert_linear") and name != "expert_linear_combine"]


def in_tiles(op: str, dtype: str = "bf16", **sizes: Any) -> Workload:
    """A case for which this way is taken, however few pairs there are."""
    given = case(op, dtype, **sizes)
    return replace(given, op=packed_ways(given.op, Ways(streamed=0)))


def ragged(counts: Sequence[int], op: str = "expert_linear", dtype: str = "bf16", **sizes: Any) -> Workload:
    """A case in which expert i has counts[i] pairs, of rows that are not in order."""
    given = in_tiles(op, dtype, n=sum(counts), s=1, E=len(counts), **sizes)
    chosen = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    experts = np.random.default_rng(1).permutation(chosen)[:, None]
    x, w, _, _, b = given.ins
    return replace(given, ins=(x, w, *sort_pairs.reference(experts, E=len(counts)), b))


def plan(device: Device, op: str, n: int, s: int, E: int, m: int, k: int, W: str) -> Sequence[Launch]:
    """The launches of a shape, which is described: nothing is computed. W: a format, or none for plain weights."""
    rows = m if op == "expert_linear" else 2 * m
    T = DTYPES["bf16"]
    packed = Packed((E, rows, k), (described(E * expert_rows(rows), k, CATALOG[W]),)) if W else None
    w = packed or abstract((E, rows, k), T)
    x = abstract((n, k), T)
    pairs, offsets = (abstract((size,), np.dtype(np.int32)) for size in (n * s, E + 1))
    found = OPS[op].bind([x, w, pairs, offsets, None], attributes(OPS[op], KNOBS.get(op, {}), T))
    kernels = OPS[op].kernels
    assert kernels is not None
    return kernels(found, device).launches


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_every_format(name: str, device: Device, files: list[str]) -> None:
    """Columns that end within a block's first half, an odd number of steps, and tiles of w beyond the last."""
    run(in_tiles("expert_linear_silu_mul", n=9, s=2, E=3, m=48, k=296, W=name), files, device)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("op", PRODUCTS)
def test_every_activation(op: str, device: Device, files: list[str]) -> None:
    """In f16, with a bias and an expert without pairs, over more columns of y than a block has."""
    run(in_tiles(op, "f16", n=7, s=2, E=4, m=144, k=128, W="mxfp4", chosen=3), files, device)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("counts", [(64, 0, 33, 1), (65, 0, 130)], ids=str)
def test_tiles_of_an_expert(counts: tuple[int, ...], device: Device, files: list[str]) -> None:
    """Full ones, one pair alone, experts without any; rows of w that end within a block, scales of rows; rings that are
    gone through more than once."""
    run(ragged(counts, m=23, k=552, W="int8", b=False), files, device)


WEIGHTS = pytest.mark.parametrize(("weights", "depth"), [({"W": "mxfp4"}, 6), ({}, 4)], ids=["packed", "plain"])


@pytest.mark.slow
@WEIGHTS
def test_products_of_every_height_on_hopper(weights: dict[str, str], depth: int) -> None:
    """Products of 64 to 256 pairs, two of 160 for an expert with 300."""
    counts = (300, 0, 256, 210, 190, 100, 70, 1)
    workload = ragged(counts, "expert_linear_clamped_swiglu", m=16, k=136, **weights)
    (launch,) = planned(workload, workload.ins, HOPPER, abstract)[0]
    assert f"256, {depth}>" in launch.expression
    run(workload, WGMMA, HOPPER)


@BOTH
@pytest.mark.parametrize("op", ["expert_linear", "expert_linear_silu_mul"])
def test_plain_weights(op: str, device: Device, files: list[str]) -> None:
    """Columns of y that end within a tile of rows of w, a step that ends within a vector's lanes, rings that are gone
    through more than once, an expert without pairs and one with a single pair."""
    run(ragged((64, 0, 33, 1, 130), op, "f16", m=141, k=712), files, device)


def test_a_gpu_with_little_shared_memory() -> None:
    workload = ragged((70, 120), "expert_linear_silu_mul", m=32, k=712, W="int8 g128")
    (launch,) = planned(workload, workload.ins, SMALL, abstract)[0]
    assert "128, 3>" in launch.expression
    run(workload, MMA, SMALL)


def test_the_tiles_of_gpt_oss() -> None:
    """2,048 tokens: 256 pairs of an expert and 64 columns of y in a block, which has a multiprocessor for itself."""
    (launch,) = plan(Device(), "expert_linear_clamped_swiglu", n=2048, s=4, E=32, m=2880, k=2880, W="mxfp4")
    assert launch.kernel.endswith(":expert_linear_packed_many_wgmma")
    assert (launch.grid, launch.block) == (((32 + 32) * 45,), (256,))
    assert launch.shared == 6 * 256 * 128 + 3 * 8 * 1088 + 1024
    (launch,) = plan(Device(80), "expert_linear", n=2048, s=4, E=32, m=2880, k=2880, W="mxfp4")
    assert (launch.grid, launch.block) == (((64 + 32) * 23,), (128,))


def test_two_blocks_share_a_multiprocessor_where_experts_have_few_pairs() -> None:
    for tokens, rows, blocks in ((1024, 256, 1), (640, 64, 2)):
        for W in ("int4 g128", ""):
            (launch,) = plan(Device(), "expert_linear_silu_mul", n=tokens, s=8, E=128, m=768, k=2048, W=W)
            assert launch.constants["ROWS"] == rows
            assert launch.shared <= Device().shared // blocks - 4096


def test_tiles_may_be_held_low() -> None:
    """For comparing heights: a tile has no more pairs than that, and the result is the same."""
    workload = ragged((130, 0, 110), m=16, k=72, W="mxfp4")
    low = replace(workload, op=packed_ways(workload.op, Ways(rows=64)))
    (launch,) = planned(low, low.ins, HOPPER, abstract)[0]
    assert "64, 6>" in launch.expression
    run(low, WGMMA, HOPPER)


def test_plain_weights_go_in_tiles_where_these_fill_the_gpu() -> None:
    """Of Qwen3-30B-A3B from two rows on; of few experts only where each has many pairs."""
    large: dict[str, Any] = dict(s=8, E=128, m=768, k=2048, W="")
    for n, kernel in ((1, "experts_mma.cu"), (2, "experts_many_wgmma.cu"), (64, "experts_many_wgmma.cu")):
        assert plan(Device(), "expert_linear_silu_mul", n=n, **large)[0].kernel.split(":")[0] == kernel
    small: dict[str, Any] = dict(s=1, E=2, m=64, k=64, W="")
    for n, kernel in ((8, "experts_mma.cu"), (9, "experts_many_wgmma.cu")):
        assert plan(Device(), "expert_linear_silu_mul", n=n, **small)[0].kernel.split(":")[0] == kernel


@pytest.mark.parametrize(
    ("device", "sizes"),
    [
        (replace(HOPPER, deterministic=True), {}),
        (HOPPER, {"W": "bf16"}),
        (HOPPER, {"k": 76}),
        (HOPPER, {"m": 40}),
        (Device(75, 3, 65536), {}),
        (replace(SMALL, shared=49152), {}),
    ],
    ids=["deterministic", "codes", "columns", "halves", "arch", "shared"],
)
def test_what_is_unpacked_to_scratch_all_the_same(device: Device, sizes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"n": 200, "s": 1, "E": 2, "m": 32, "k": 72, "W": "mxfp4", **sizes}
    assert plan(device, "expert_linear_silu_mul", **given)[0].kernel == "unpack.cu:unpack"
