"""Every op of the registry: its cases and random ones, every dtype, on every executor that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.cuda.loading import pack_kernels
from cuplama.backends.cuda.rounding import rounding_kernels
from cuplama.dtypes import Array
from cuplama.folders import source_folder
from cuplama.lab.check import BackendExecutor, check, model_dtypes, run_guarded
from cuplama.lab.emulation import EmulatedDevice, emulator_missing
from cuplama.lab.peaks import READ_KERNEL
from cuplama.lab.workloads import Workload, case_workload, described_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device
from cuplama.ops.missing import missing
from cuplama.ops.op import Call, Op
from cuplama.ops.prototypes import prototypes
from cuplama.ops.weights import segments_of

from . import harness
from .harness import Case

_ALL = list(harness.all_cases())
_WITH_KERNELS = list(harness.all_cases(lambda op: op.kernels is not None))
_NAMES = [harness.name_of(*c) for c in _ALL]
_KERNEL_NAMES = [harness.name_of(*c) for c in _WITH_KERNELS]

# Kernels of no op: the CUDA backend prepares biases, packed weights and 8-bit activations for cuBLAS, and packs weights
# when it loads them; read_sum measures the bandwidth.
_OF_NO_OP = {
    "bias.cu:cast_bias", "bias.cu:fill_rows", "unpack.cu:unpack", "unpack.cu:unpack_codes", ":".join(READ_KERNEL),
    *(f"activations_fp8.cu:{before}quantise" for before in ("", "rms_norm_", "silu_mul_", "gelu_tanh_mul_")),
    *(f"{file}:{kernel.partition('<')[0]}" for file, kernel in (*pack_kernels(), *rounding_kernels())),
}  # fmt: skip


def _bind(op: Op, case: Case, T: str) -> Call:
    return described_workload(op, case, T).bind()


def _marks(case: Case, T: str) -> list[pytest.MarkDecorator]:
    """Large batches of attention have millions of keys: one dtype is enough for the fast tests."""
    return [pytest.mark.slow] * (case.get("b", 0) > 8 and T != "bf16")


@pytest.mark.parametrize(("op", "case", "T"), [pytest.param(*c, marks=_marks(*c[1:])) for c in _ALL], ids=_NAMES)
def test_reference(op: Op, case: Case, T: str) -> None:
    """The reference in T agrees with itself in float64. Its inputs are as the case describes them."""
    workload = harness.workload(op, case, T)
    arrays = workload.arrays()
    described = described_workload(op, case, T).ins
    assert [x is None for x in arrays] == [x is None for x in described]
    for array, x in zip(arrays, described, strict=True):
        if array is not None and segments_of(array) is None:
            assert (array.shape, array.dtype) == (x.shape, x.dtype)
    check(workload, arrays, harness.run_reference(workload, arrays))


@pytest.mark.parametrize(("op", "case", "T"), _WITH_KERNELS, ids=_KERNEL_NAMES)
@pytest.mark.parametrize("device", [Device(75, 40, 65536), Device()], ids=["sm_75", "sm_90"])
def test_launches_bind(op: Op, case: Case, T: str, device: Device) -> None:
    """Every launch finds its arguments by name, with the types of the signature, within the limits of CUDA."""
    if T == "bf16" and device.arch < 80:
        T = "f16"
    harness.check_launches(described_workload(op, case, T), device)


def test_every_kernel_is_launched() -> None:
    """No kernel of cuda_src/ is dead: every one is used by some case on some architecture."""
    used = set(_OF_NO_OP)
    for op, case, T in _WITH_KERNELS:
        call = _bind(op, case, T)
        for device in (Device(75, 40, 65536), Device(80), Device()):
            assert op.kernels is not None
            used |= {launch.kernel for launch in op.kernels(call, device).launches}
    there = {f"{f.name}:{name}" for f in source_folder().glob("*.cu") for name in prototypes(f.name)}
    assert used == there


def test_nothing_is_missing() -> None:
    assert missing(_OF_NO_OP, bind=_bind) == []


def test_what_is_missing_is_named() -> None:
    """In one line each: what an op lacks, and what lacks an op."""
    of_no_op = [f"{stem}.cu: no op launches it" for stem in ("activations_fp8", "bias", "pack", "peaks", "quantise")]
    assert missing(bind=_bind) == [*of_no_op, "unpack.cu: no op launches unpack_codes"]
    bare = Op("bare", "y[n]:T = (x[n]:T)", doc="", reference=lambda x: x)
    with_kernels = Op("two", "y[n]:T = (x[n]:T)", "", lambda x: x, kernels=OPS["sample"].kernels, cases=[dict(n=1)])
    lines = missing(_OF_NO_OP, {**OPS, "bare": bare, "two": with_kernels}, _bind)
    assert lines[:3] == ["op bare: no documentation", "op bare: no cases", "op bare: no random sizes"]
    assert "op bare: no kernels" in lines
    assert any(line.startswith("op two: its launches cannot be planned: ") for line in lines)


# ---- the emulator ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all cases that run here, or in the workers beside this one."""
    if emulator_missing():
        return
    worker, workers = (
        os.environ.get(f"PYTEST_XDIST_WORKER{part}", alone) for part, alone in (("", "gw0"), ("_COUNT", "1"))
    )
    items = (item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path)
    found: list[dict[str, Any]] = [
        item.callspec.params for item in items if item.originalname == test_emulator.__name__
    ]
    cases = [(params["op"], params["case"], params["T"]) for params in found]
    harness.precompile(cases, Fraction(int(worker.removeprefix("gw")), int(workers)))


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("op", "case", "T"), _WITH_KERNELS, ids=_KERNEL_NAMES)
def test_emulator(op: Op, case: Case, T: str) -> None:
    """The kernels' own text, executed on the CPU."""
    workload = harness.workload(op, case, T)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice()))


def shifted(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy 4 bytes past a 16-byte boundary, where accesses of 16 bytes are not allowed."""
    raw = np.concatenate([np.zeros(4, np.uint8), np.ascontiguousarray(array).view(np.uint8).reshape(-1)])
    out: np.ndarray[Any, Any] = raw[4:].view(array.dtype).reshape(array.shape)
    return out


class Shifted(EmulatedDevice):
    """All arrays begin where 16-byte accesses are not allowed; only the blocks of packed weights always allow them."""

    def upload(self, array: Array) -> Array:
        return shifted(array) if segments_of(array) is None else super().upload(array)


def unaligned_workloads() -> Iterator[Workload]:
    """Of each op whose arrays may begin anywhere, a few cases."""
    for op in OPS.values():
        if op.kernels is not None and op.unaligned:
            T = "f16" if "f16" in model_dtypes(op) else "f32"
            for case in op.cases[:5]:
                yield harness.workload(op, case, T)


@pytest.mark.parametrize("workload", list(unaligned_workloads()), ids=lambda w: w.label.replace(" ", "-"))
def test_unaligned_arrays(workload: Workload) -> None:
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, Shifted()))


@pytest.mark.parametrize("name", ["linear", "linear_add", "rms_norm_linear", "layer_norm_linear_gelu_tanh"])
@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_a_row_of_a_product_does_not_depend_on_the_others(name: str, T: str) -> None:
    """Bit for bit, from two rows on: one row has a kernel of its own."""
    op, case = OPS[name], dict(n=8, m=37, k=1096, b=True, U="T", eps=1e-5)
    workload = case_workload(op, case, T)
    arrays = workload.arrays()
    (together,) = run_guarded(workload, arrays, EmulatedDevice())
    for rows in (slice(0, 2), slice(3, 8)):
        few = [x[rows] if s.name in ("x", "a") and x is not None else x
               for s, x in zip(op.signature.ins, arrays, strict=True)]  # fmt: skip
        part = Workload(op, tuple(few), workload.attrs, T)
        (alone,) = run_guarded(part, few, EmulatedDevice())
        assert np.array_equal(alone.view(np.uint8), together[rows].view(np.uint8))


# ---- the GPU ---------------------------------------------------------------------------------------------------------


@cache
def _gpu() -> BackendExecutor | str:
    """The executor on device 0, or the reason why there is none."""
    works, reason = cuda_available()
    return BackendExecutor(CudaBackend("f32")) if works else reason


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case", "T"), _WITH_KERNELS, ids=_KERNEL_NAMES)
def test_gpu(op: Op, case: Case, T: str) -> None:
    gpu = _gpu()
    if isinstance(gpu, str):
        pytest.skip(gpu)
    if T == "bf16" and gpu.device.arch < 80:
        pytest.skip("bf16 needs sm_80; the backend runs fp16 there")
    workload = harness.workload(op, case, T)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, gpu))
