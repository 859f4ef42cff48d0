"""Products with packed weights over many rows: the kernel of unpack.cu on the emulator, and what cuBLAS is given."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cuplama.backends.cuda import planning, unpacking
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.unpacking import largest_slice, row_slices
from cuplama.dtypes import DTYPES
from cuplama.lab.check import Executor
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.binding import bind
from cuplama.ops.op import ROUNDING
from cuplama.ops.unpacking import UNPACKED
from cuplama.ops.weights import MAX_PACKED_ROWS
from cuplama.quant.catalog import CATALOG, random_stored
from cuplama.quant.weight import Weight
from cuplama.simt.emulator import precompile
from tests.fakes import FakeGpu, HostCublas

_N = MAX_PACKED_ROWS + 1
_MIXED = "int4 g32 ordered + fp8"
_DTYPES = ("f32", "f16", "bf16")
CASES: list[Any] = [
    *((name, _DTYPES[i % 3], 37, 200) for i, name in enumerate(CATALOG)),
    ("int4 g128", "bf16", 16, 264),  # whole blocks of 8 columns
    ("Q6_K + int4 g128 + fp8", "f16", 75, 128),
    ("int4 g128 ordered + fp8", "bf16", 20, 72),
    ("fp8", "f32", 3, 1100),  # two thread blocks side by side, and a row that 16 bytes do not divide
    ("int4 g128", "f16", 18, 204),
    ("int4 g128 + fp8", "bf16", 40, 72, 1),  # slices of 14 rows and 13, which begin within a block
    ("int4 g128 + fp8", "bf16", 40, 72, 13),
]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All instances at once takes less time than one by one."""
    instances = {
        f"unpack<{T}, {form.packing.type}>"
        for formats, T, *_ in [*CASES, (_MIXED, "bf16"), (_MIXED, "f16")]
        for name in formats.split(" + ")
        if (form := CATALOG[name.removesuffix(" ordered")]).packing is not None
    }
    precompile([("unpack.cu", name) for name in sorted(instances)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_is_unpacked_to_its_numbers(case: Any) -> None:
    check_unpacked(EmulatedDevice(), *case)


def check_unpacked(executor: Executor, formats: str, T: str, m: int, k: int, rows: int = 0) -> None:
    """The launches before a product of x[65,k] and w[m,k] write the numbers of w, rounded to T. rows: of a slice, a
    multiple of which is 14 rows at most; 0 for all at once."""
    workload = case_workload(OPS["linear"], dict(n=_N, m=m, k=k, b=False, U="T", W=formats), T)
    sizes: dict[str, Any] = {"_SLICE_ROWS": rows, "SLICE_BYTES": 14 * k * DTYPES[T].itemsize} if rows else {}
    with mock.patch.multiple(unpacking, **sizes) if sizes else nullcontext():
        (way,) = planning._ways(workload.bind())
    weight: Any = workload.ins[1]
    packed = executor.upload(weight)
    want = weight.numbers().astype(np.float64)
    dense = np.full((way.parts[0].stop + 2, k), np.nan, DTYPES[T])
    done = 0
    for part in way.parts:
        for launch in way.before.launches[done : part.launches]:
            call = workload.bind()
            call.arrays["w"] = packed
            executor.launch(bind(launch, call, {UNPACKED: dense}))
        got = dense[: part.stop - part.start].astype(np.float64)
        wanted = want[part.start : part.stop]
        size = np.abs(wanted) + 1e-3 * np.abs(want).max()  # where an offset takes most of a number away
        assert (np.abs(got - wanted) <= (ROUNDING[T] + 2 * ROUNDING["f32"]) * size).all()
        done = part.launches
    assert np.isnan(dense[-2:].astype(np.float32)).all()
    assert sum(part.stop - part.start for part in way.parts) == m


@pytest.mark.parametrize(("m", "k", "count"), [(28672, 4096, 1), (57344, 8192, 4), (7, 5, 1), (128256, 4096, 4)])
def test_slices_are_equal_and_bounded(m: int, k: int, count: int) -> None:
    slices = row_slices(m, k, 2)
    assert len(slices) == count
    assert [s for s, _ in slices] == [0, *(e for _, e in slices[:-1])]
    assert slices[-1][1] == m
    assert max(e - s for s, e in slices) * k * 2 == largest_slice({"w": (m, k)}, 2) <= unpacking.SLICE_BYTES
    assert all((e - s) % 256 == 0 for s, e in slices[:-1])


@pytest.mark.parametrize("op", ["linear", "linear_add"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(("T", "U"), [("bf16", "f32"), ("f16", "f16")])
def test_many_rows_are_multiplied_by_cublas(
    op: str, bias: bool, sliced: bool, T: str, U: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if op == "linear_add" and U != "f32":
        pytest.skip("its result is f32")
    if sliced:
        monkeypatch.setattr(unpacking, "_SLICE_ROWS", 16)
        monkeypatch.setattr(unpacking, "SLICE_BYTES", 16 * 72 * 2)
    backend = CudaBackend(T, gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    case = dict(n=_N, m=40, k=72, b=bias, U="T" if T == U else "f32", W=_MIXED)
    workload = case_workload(OPS[op], case, T)
    ins = [None if x is None else backend.upload(x) for x in workload.ins]
    (y,) = backend.call(OPS[op], ins, workload.attrs)
    want = workload.op.reference(*workload.ins, **workload.attrs)
    gpu: Any = backend.gpu
    assert [name.split("<")[0] for name in gpu.launches].count("unpack") == (4 if sliced else 2)
    assert np.abs(backend.download(y).astype(np.float32) - want).max() < (0.1 if T == "bf16" else 0.02)


def test_all_products_share_the_scratch_of_the_largest_weight() -> None:
    """A captured pass keeps no scratch of its own."""
    gpu = FakeGpu(cublas=HostCublas())
    backend = CudaBackend("f16", gpu=gpu)
    shapes = {"0.qkv_proj": (24, 128), "0.down_proj": (16, 520), "embed_tokens": (900, 128)}
    weights = {}
    for name, (m, k) in shapes.items():
        stored = random_stored(CATALOG["int4 g128"], m, k, np.random.default_rng(0))
        weights[name] = backend.load_weight(Weight(name, (name,), (stored,)))
    backend.end_loading()
    for n in (_N, _N + 1):
        for name in ("0.qkv_proj", "0.down_proj"):
            before = len(gpu.alive)
            x = backend.upload(np.zeros((n, shapes[name][1]), np.float16))
            backend.call(OPS["linear"], [x, weights[name]], {"U": "f16"})
            del x
            backend.synchronize()
            assert len(gpu.alive) == before + (n == _N and name == "0.qkv_proj")
    (scratch,) = (a for a in gpu.alive if a.dtype == np.float16)
    assert scratch.nbytes == largest_slice(shapes, 2) == 16 * 520 * 2


def test_up_to_64_rows_a_packed_weight_is_multiplied_as_it_is() -> None:
    for n, unpacked in ((MAX_PACKED_ROWS, False), (_N, True)):
        workload = case_workload(OPS["linear"], dict(n=n, m=16, k=128, b=False, U="T", W="fp8"), "f16")
        gpu = FakeGpu(cublas=HostCublas())
        assert (planning._by_library(gpu, workload.bind()) is not None) == unpacked
