"""Products with packed weights over many rows: the kernel of unpack.cu on the emulator, and what cuBLAS is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda import planning, unpacking
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.unpacking import row_slices, slice_bytes
from cuplama.dtypes import DTYPES
from cuplama.lab.check import Executor
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.binding import bind
from cuplama.ops.op import ROUNDING
from cuplama.ops.weights import MAX_PACKED_ROWS
from cuplama.quant.catalog import CATALOG
from tests.fakes import FakeGpu, HostCublas

_N = MAX_PACKED_ROWS + 1
_DTYPES = ("f32", "f16", "bf16")
CASES = [
    *((name, _DTYPES[i % 3], 37, 200) for i, name in enumerate(CATALOG)),
    ("int4 g128", "bf16", 16, 264),  # whole blocks of 8 columns
    ("Q6_K + int4 g128 + fp8", "f16", 75, 128),
    ("int4 g128 ordered + fp8", "bf16", 20, 72),
    ("fp8", "f32", 3, 1100),  # two thread blocks side by side, and a row that 16 bytes do not divide
]


@pytest.mark.parametrize(("formats", "T", "m", "k"), CASES)
def test_a_weight_is_unpacked_to_its_numbers(formats: str, T: str, m: int, k: int) -> None:
    check_unpacked(EmulatedDevice(), formats, T, m, k)


@pytest.mark.parametrize("rows", [1, 13])
def test_slices_are_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they begin: within a block, or at the border of segments."""
    monkeypatch.setattr(unpacking, "_SLICE_ROWS", rows)
    monkeypatch.setattr(unpacking, "SLICE_BYTES", 14 * 72 * 2)
    check_unpacked(EmulatedDevice(), "int4 g128 + fp8", "bf16", 40, 72)


def check_unpacked(executor: Executor, formats: str, T: str, m: int, k: int) -> None:
    """The launches before a product of x[65,k] and w[m,k] write the numbers of w, rounded to T."""
    workload = case_workload(OPS["linear"], dict(n=_N, m=m, k=k, b=False, U="T", W=formats), T)
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
            executor.launch(bind(launch, call, {"dense": dense}))
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
    assert max(e - s for s, e in slices) * k * 2 == slice_bytes(m, k, 2) <= unpacking.SLICE_BYTES
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
    case = dict(n=_N, m=40, k=72, b=bias, U="T" if T == U else "f32", W="int4 g32 ordered + fp8")
    workload = case_workload(OPS[op], case, T)
    ins = [None if x is None else backend.upload(x) for x in workload.ins]
    (y,) = backend.call(OPS[op], ins, workload.attrs)
    want = workload.op.reference(*workload.ins, **workload.attrs)
    gpu: Any = backend.gpu
    assert [name.split("<")[0] for name in gpu.launches].count("unpack") == (4 if sliced else 2)
    assert np.abs(backend.download(y).astype(np.float32) - want).max() < (0.1 if T == "bf16" else 0.02)


def test_up_to_64_rows_a_packed_weight_is_multiplied_as_it_is() -> None:
    for n, unpacked in ((MAX_PACKED_ROWS, False), (_N, True)):
        workload = case_workload(OPS["linear"], dict(n=n, m=16, k=128, b=False, U="T", W="fp8"), "f16")
        gpu = FakeGpu(cublas=HostCublas())
        assert (planning._by_library(gpu, workload.bind()) is not None) == unpacked
