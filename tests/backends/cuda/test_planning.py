"""Products of a backward pass: which of them cuBLAS computes, from which arrays, and what the kernels do without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda import planning, unpacking
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.lab.check import check
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from tests.fakes import FakeGpu, HostCublas

_NOTHING: Any = HostCublas(lambda bias, add: True)
# op, case, kernels that are launched beside a product of the library, kernels without one
_CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("linear_backward_x", dict(m=24, k=40, a=False), [], ["linear_backward_x"]),
    ("linear_backward_x", dict(m=23, k=41, a=True), [], ["linear_backward_x"]),
    ("linear_backward_x", dict(m=24, k=72, a=True, W="int4 g128"), ["unpack"], ["unpack", "linear_backward_x"]),
    ("linear_backward_x", dict(m=40, k=136, a=False, W="int4 g32 ordered + fp8"), ["unpack"] * 2,
     ["unpack"] * 2 + ["linear_backward_x"]),
    ("linear_backward_w", dict(m=23, k=41), [], ["linear_backward_w"]),
]  # fmt: skip


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case[0]}-{case[1]}".replace(" ", ""))
@pytest.mark.parametrize("T", ["f32", "bf16"])
@pytest.mark.parametrize("cublas", ["all", "nothing", None])
def test_products_of_a_backward_pass_go_to_cublas_for_any_number_of_rows(case: Any, T: str, cublas: str | None) -> None:
    name, sizes, beside, alone = case
    library: Any = {"all": HostCublas(), "nothing": _NOTHING, None: None}[cublas]
    gpu = FakeGpu(emulate=True, cublas=library)
    backend = CudaBackend(T, gpu=gpu)
    for n in (1, 7, 70):
        workload = case_workload(OPS[name], {"n": n, **sizes}, T)
        arrays = workload.arrays()
        gpu.launches.clear()
        (out,) = backend.call(OPS[name], [None if x is None else backend.upload(x) for x in arrays], workload.attrs)
        assert [launch.split("<")[0] for launch in gpu.launches] == (beside if cublas == "all" else alone)
        check(workload, arrays, [backend.download(out)])


def test_a_bias_has_no_product() -> None:
    workload = case_workload(OPS["linear_backward_b"], dict(n=70, m=24), "bf16")
    gpu = FakeGpu(emulate=True, cublas=HostCublas())
    backend = CudaBackend("bf16", gpu=gpu)
    arrays = workload.arrays()
    (out,) = backend.call(workload.op, [backend.upload(x) for x in arrays if x is not None], {})
    assert gpu.launches == ["column_sums<bf16>", "linear_backward_b"]
    check(workload, arrays, [backend.download(out)])


def test_a_weight_that_is_summed_over_is_unpacked_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices for x w^T, whose columns they are."""
    monkeypatch.setattr(unpacking, "_SLICE_ROWS", 16)
    monkeypatch.setattr(unpacking, "SLICE_BYTES", 16 * 72 * 2)
    for name, parts in (("linear", [(0, 16), (16, 32), (32, 40)]), ("linear_backward_x", [(0, 40)])):
        case = dict(n=70, m=40, k=72, a=False, b=False, U="T", W="int4 g128")
        way = list(planning._ways(case_workload(OPS[name], case, "bf16").bind()))[-1]
        assert [(part.start, part.stop) for part in way.parts] == parts


def test_codes_of_8_bit_floats_are_no_factors_of_a_backward_product() -> None:
    case = dict(n=128, m=128, k=128, a=False, b=False, U="T", W="fp8")
    for name, ways in (("linear", 2), ("linear_backward_x", 1)):
        assert len(list(planning._ways(case_workload(OPS[name], case, "bf16").bind(), eight_bit=True))) == ways


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("T", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("n", [1, 7, 2048])
@pytest.mark.parametrize(("m", "k"), [(50257, 768), (768, 3072), (65, 7)])
def test_products_of_a_backward_pass(real: CudaBackend, T: str, n: int, m: int, k: int) -> None:
    """By cuBLAS, whatever the length of rows, against float64; twice, with the same bits."""
    real.dtype = DTYPES[T]
    for name, case in (("linear_backward_x", dict(a=False)), ("linear_backward_x", dict(a=True)),
                       ("linear_backward_w", dict())):  # fmt: skip
        workload = case_workload(OPS[name], {"n": n, "m": m, "k": k, **case}, T)
        assert planning._by_library(real.gpu, workload.bind()) is not None
        arrays, outs = workload.arrays(), []
        for _ in range(2):
            ins = [None if x is None else real.upload(x) for x in arrays]
            outs += [real.download(out) for out in real.call(workload.op, ins, workload.attrs)]
        check(workload, arrays, outs[:1])
        assert np.array_equal(outs[0].view(np.uint8), outs[1].view(np.uint8))
