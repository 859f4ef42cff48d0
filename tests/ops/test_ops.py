"""Every op of the registry: its cases and random ones, every dtype, on every executor that this machine has."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, Array
from cuplama.folders import source_folder
from cuplama.lab import inventory as compiler
from cuplama.ops import OPS
from cuplama.ops.launch import BoundLaunch, Device
from cuplama.ops.op import Op
from cuplama.ops.prototypes import prototypes

from . import harness
from .harness import Case

_ALL = list(harness.all_cases())
_WITH_KERNELS = list(harness.all_cases(lambda op: op.kernels is not None))
_NAMES = [harness.name_of(*c) for c in _ALL]
_KERNEL_NAMES = [harness.name_of(*c) for c in _WITH_KERNELS]


@pytest.mark.parametrize(("op", "case", "T"), _ALL, ids=_NAMES)
def test_reference(op: Op, case: Case, T: str) -> None:
    """The reference in T agrees with itself in float64."""
    ins = harness.random_inputs(op, case, T)
    harness.check(op, case, T, ins, harness.run_reference(op, case, T, ins))


@pytest.mark.parametrize(("op", "case", "T"), _WITH_KERNELS, ids=_KERNEL_NAMES)
@pytest.mark.parametrize("device", [Device(75, 40, 65536), Device()], ids=["sm_75", "sm_90"])
def test_launches_bind(op: Op, case: Case, T: str, device: Device) -> None:
    """Every launch finds its arguments by name, with the types of the signature, within the limits of CUDA."""
    if T == "bf16" and device.arch < 80:
        T = "f16"
    call = harness.bind_inputs(op, case, harness.random_inputs(op, case, T))
    assert op.kernels is not None
    harness.check_plan(op, call, op.kernels(call, device), device)


def test_every_kernel_is_launched() -> None:
    """No kernel of cuda_src/ is dead: every one is used by some case on some architecture."""
    # Not of an op: the CUDA backend prepares biases for cuBLAS; read_sum measures the bandwidth.
    used = {"bias.cu:cast_bias", "bias.cu:fill_rows", *(f"{file}:{name}" for file, name in compiler.TOOLS)}
    for op, case, T in _WITH_KERNELS:
        for device in (Device(75, 40, 65536), Device()):
            call = harness.bind_inputs(op, case, harness.random_inputs(op, case, T))
            assert op.kernels is not None
            used |= {launch.kernel for launch in op.kernels(call, device).launches}
    there = {f"{f.name}:{name}" for f in source_folder().glob("*.cu") for name in prototypes(f.name)}
    assert used == there


# ---- the emulator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case", "T"), _WITH_KERNELS, ids=_KERNEL_NAMES)
def test_emulator(op: Op, case: Case, T: str) -> None:
    """The kernels' own text, executed on the CPU."""
    ins = harness.random_inputs(op, case, T)
    harness.check(op, case, T, ins, harness.run_kernels(op, case, ins, harness.Emulator()))


def shifted(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy 4 bytes past a 16-byte boundary, where accesses of 16 bytes are not allowed."""
    raw = np.concatenate([np.zeros(4, np.uint8), np.ascontiguousarray(array).view(np.uint8).reshape(-1)])
    out: np.ndarray[Any, Any] = raw[4:].view(array.dtype).reshape(array.shape)
    return out


class _Shifted(harness.Emulator):
    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        return shifted(array)


ANY_ALIGNMENT = ("embedding", "embedding_pos", "rms_norm", "layer_norm", "qk_norm", "linear", "rope", "kv_append",
                 "silu_mul", "gelu_tanh", "gelu_erf", "add", "select_rows", "linear_add", "rms_norm_linear_silu_mul",
                 "layer_norm_linear")  # fmt: skip


def unaligned_cases(name: str) -> list[tuple[Op, Case, str]]:
    op = OPS[name]
    T = "f16" if "f16" in harness.dtypes(op) else "f32"
    return [(op, case, T) for case in op.cases[:5]]


@pytest.mark.parametrize("name", ANY_ALIGNMENT)
def test_unaligned_arrays(name: str) -> None:
    for op, case, T in unaligned_cases(name):
        ins = harness.random_inputs(op, case, T)
        harness.check(op, case, T, ins, harness.run_kernels(op, case, ins, _Shifted()))


@pytest.mark.parametrize("name", ["linear", "linear_add", "rms_norm_linear", "layer_norm_linear_gelu_tanh"])
@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_a_row_of_a_product_does_not_depend_on_the_others(name: str, T: str) -> None:
    """Bit for bit, from two rows on: one row has a kernel of its own."""
    op, case = OPS[name], dict(n=8, m=37, k=1096, b=True, U="T", eps=1e-5)
    ins = harness.random_inputs(op, case, T)
    (together,) = harness.run_kernels(op, case, ins, harness.Emulator())
    for rows in (slice(0, 2), slice(3, 8)):
        few = {key: x[rows] if key in ("x", "a") and x is not None else x for key, x in ins.items()}
        (alone,) = harness.run_kernels(op, {**case, "n": rows.stop - rows.start}, few, harness.Emulator())
        assert np.array_equal(alone.view(np.uint8), together[rows].view(np.uint8))


# ---- the GPU ---------------------------------------------------------------------------------------------------------


@cache
def _gpu() -> harness.Executor | str:
    """The executor on device 0, or the reason why there is none."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as e:  # no cupy, no driver or no device: CuPy has an exception for each
        return f"no GPU: {str(e).splitlines()[0]}"
    return _Gpu(cupy) if count else "no GPU: the driver has no device"


class _Gpu:
    def __init__(self, cupy: Any) -> None:
        self._cupy, self._compiler = cupy, compiler
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        arch = 10 * properties["major"] + properties["minor"]
        self.device = Device(arch, properties["multiProcessorCount"], properties["sharedMemPerBlockOptin"])
        self._functions: dict[tuple[str, str], Any] = {}

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        return self._cupy.asarray(array)

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        content: np.ndarray[Any, Any] = array.get()
        return content

    def launch(self, bound: BoundLaunch) -> None:
        key = (bound.file, bound.expression)
        if key not in self._functions:
            options = self._compiler.options(self._cupy.cuda.nvrtc.getVersion()[0], self.device.arch)
            module = self._cupy.RawModule(
                code=self._compiler.source(bound.file), options=options, name_expressions=[bound.expression]
            )
            self._functions[key] = module.get_function(bound.expression)
            self._functions[key].max_dynamic_shared_size_bytes = max(48 * 1024, bound.shared)
        function = self._functions[key]
        if bound.shared > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = bound.shared
        function(bound.grid, bound.block, bound.args, shared_mem=bound.shared)
        self._cupy.cuda.get_current_stream().synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case", "T"), _WITH_KERNELS, ids=_KERNEL_NAMES)
def test_gpu(op: Op, case: Case, T: str) -> None:
    gpu = _gpu()
    if isinstance(gpu, str):
        pytest.skip(gpu)
    if T == "bf16" and gpu.device.arch < 80:
        pytest.skip("bf16 needs sm_80; the backend runs fp16 there")
    ins = harness.random_inputs(op, case, T)
    harness.check(op, case, T, ins, harness.run_kernels(op, case, ins, gpu))


# ---- the harness itself ----------------------------------------------------------------------------------------------


def _outputs(name: str, T: str = "f32") -> tuple[Op, Case, harness.Arrays, list[np.ndarray[Any, Any]]]:
    op = OPS[name]
    ins = harness.random_inputs(op, op.cases[1], T)
    return op, op.cases[1], ins, harness.run_reference(op, op.cases[1], T, ins)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-3])
def test_check_finds_one_wrong_float(value: float) -> None:
    op, case, ins, (out,) = _outputs("rms_norm")
    out.flat[-1] += value
    with pytest.raises(AssertionError, match="1 of 24 elements wrong, the first at \\(2, 7\\)"):
        harness.check(op, case, "f32", ins, [out])


def test_check_finds_a_wrong_integer() -> None:
    op, case, ins, (out,) = _outputs("sample")
    out[0] += 1
    with pytest.raises(AssertionError, match="token of sample"):
        harness.check(op, case, "f32", ins, [out])


@pytest.mark.parametrize("T", list(DTYPES)[1:4])
def test_check_finds_a_touched_cache(T: str) -> None:
    op, case, ins, (k, v) = _outputs("kv_append", T)
    assert ins["slot_mapping"] is not None
    free = next(s for s in range(case["P"] * case["S"]) if s not in ins["slot_mapping"])
    v[free // case["S"], 0, free % case["S"], 0] *= -1
    with pytest.raises(AssertionError, match="changed outside"):
        harness.check(op, case, T, ins, [k, v])


def test_a_write_past_the_end_is_found() -> None:
    class Careless(harness.Emulator):
        def launch(self, bound: BoundLaunch) -> None:
            y = bound.args[[p.name for p in bound.prototype.parameters].index("y")]
            y[...] = 0
            np.lib.stride_tricks.as_strided(y.reshape(-1), (y.size + 1,))[y.size] = 0

    op = OPS["add"]
    with pytest.raises(AssertionError, match="y was written outside"):
        harness.run_kernels(op, op.cases[0], harness.random_inputs(op, op.cases[0], "f32"), Careless())
