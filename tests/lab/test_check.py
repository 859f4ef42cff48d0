"""The judge of a kernel's result: what it accepts, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES, Array, dtype_name
from cuplama.errors import DeviceError
from cuplama.lab import check as judge
from cuplama.lab.check import (
    Checker,
    WrongResultError,
    backend_checker,
    check,
    expected,
    model_dtypes,
    planned,
    run_guarded,
)
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload, case_workloads, shape_workload
from cuplama.ops import OPS
from cuplama.ops.binding import BoundLaunch
from cuplama.ops.launch import Device
from cuplama.ops.op import ROUNDING, Op
from cuplama.ops.weights import segments_of
from tests.fakes import FakeGpu, HostCublas

Outputs = list[np.ndarray[Any, Any]]


def rounded(workload: Workload, outs: Outputs) -> Outputs:
    """Outputs in the dtypes of the signature."""
    return [np.array(o).astype(workload.call.dtype(s)) for s, o in zip(workload.op.signature.outs, outs, strict=True)]


def right(name: str, dtype: str = "f32", **shape: Any) -> tuple[Workload, list[Any], Outputs]:
    workload = shape_workload(OPS[name], shape, dtype)
    arrays = workload.arrays()
    return workload, arrays, rounded(workload, expected(workload, arrays))


def content(array: Any) -> bytes | None:
    """The bytes of an array, or of a quantised weight's numbers."""
    if array is None:
        return None
    return bytes((array if segments_of(array) is None else array.numbers()).tobytes())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * ("attention" in name and dtype != "bf16"))
        for name in OPS
        for dtype in ("f32", "f16", "bf16")
    ],
)
def test_the_reference_is_right(name: str, dtype: str) -> None:
    """The judge accepts the reference's own result, rounded to the dtypes of the signature, for every case."""
    for workload in case_workloads(OPS[name], dtype):
        arrays = workload.arrays()
        before = [content(a) for a in arrays]
        wanted = expected(workload, arrays)
        check(workload, arrays, rounded(workload, wanted), wanted)
        assert [content(a) for a in arrays] == before, "the check changed its inputs"


# ---- a result that is wrong everywhere by a little -------------------------------------------------------------------

_SCALES = (1.009, 1.005, 0.995, 0.991)
_FLOAT_OPS = [n for n, op in OPS.items() if any(s.dtype in ("T", "U", "f32") for s in op.signature.outs)]


def _accepts(workload: Workload, arrays: list[Any], wanted: Outputs, scale: float, noise: float) -> bool:
    """Whether the judge accepts results ``scale`` times too large, with errors of ``noise`` times what is allowed."""
    rng = np.random.default_rng(0)
    outs = []
    for spec, want in zip(workload.op.signature.outs, wanted, strict=True):
        if want.dtype.kind in "iu":
            outs.append(want)
            continue
        want = want.astype(np.float64)
        finite = np.where(np.isfinite(want), want, 0)
        size = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
        off = noise * workload.op.allowed(dtype_name(workload.call.dtype(spec)), workload.dtype) * size
        errors = off * rng.standard_normal(want.shape) if noise else -0.0  # what leaves a zero its sign
        outs.append(np.asarray(want * scale + errors))
    try:
        check(workload, arrays, rounded(workload, outs), wanted)
    except WrongResultError:
        return False
    return True


@pytest.mark.parametrize("name", _FLOAT_OPS)
def test_a_kernel_that_is_too_large_everywhere_is_refused(name: str) -> None:
    """By 0.9% or by 0.5%, or too small, in every dtype, on the op's own cases: each where enough elements tell a factor
    from chance, and some even with half of the error that is allowed on the result as well."""
    op = OPS[name]
    for dtype in model_dtypes(op):
        caught: set[float] = set()
        for workload in case_workloads(op, dtype):
            arrays = workload.arrays()
            wanted = expected(workload, arrays)
            assert _accepts(workload, arrays, wanted, 1.0, 0.0)
            for scale in _SCALES:
                if math.prod(workload.call.shape(op.signature.outs[0])) >= 512:
                    assert not _accepts(workload, arrays, wanted, scale, 0.0), f"{workload.label} by {scale}"
                if scale not in caught and not _accepts(workload, arrays, wanted, scale, 0.5):
                    caught.add(scale)
        assert caught == set(_SCALES), f"{name} {dtype}"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_tenth_of_a_percent_is_refused_where_one_rounding_is_allowed(dtype: str) -> None:
    workload = shape_workload(OPS["silu_mul"], {"n": 9, "f": 999}, dtype)
    scale = 1 + {"f32": 1e-6, "f16": 3e-4, "bf16": 2.1e-3}[dtype]
    arrays = workload.arrays()
    outs = rounded(workload, [scale * o for o in expected(workload, arrays)])
    with pytest.raises(WrongResultError, match=r"all of it is too large by|of the result's norm"):
        check(workload, arrays, outs)


class _TooLarge(EmulatedDevice):
    """Runs kernels right, and then makes their float outputs too large."""

    scale = 1.009

    def launch(self, bound: BoundLaunch) -> None:
        super().launch(bound)
        for p, value in zip(bound.prototype.parameters, bound.args, strict=True):
            if p.name == "y":
                value[...] = (value.astype(np.float64) * self.scale).astype(value.dtype)


@pytest.mark.parametrize(("name", "dtype"), [("rms_norm", "bf16"), ("silu_mul", "f16"), ("add", "f32")])
def test_the_emulator_of_the_lab_refuses_it(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuplama.lab import emulation

    workload = shape_workload(OPS[name], {"n": 3}, dtype)
    emulation.Emulator().check(workload)
    monkeypatch.setattr(emulation, "EmulatedDevice", _TooLarge)
    for scale in (1.009, 1.005):
        monkeypatch.setattr(_TooLarge, "scale", scale)
        with pytest.raises(WrongResultError, match=f"^{name} {dtype} n=3 .*(are wrong|is allowed)"):
            emulation.Emulator().check(workload)


def _fake_backend(emulate: bool = True) -> CudaBackend:
    backend = CudaBackend("bf16", gpu=FakeGpu(emulate=emulate, cublas=HostCublas()))
    backend.gpu.limits = Device(sms=2)
    return backend


def test_a_gpu_of_the_lab_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model runs it (cuBLAS for many rows), and its kernels alone."""
    backend = _fake_backend()
    for name, shape in (("rms_norm", {"n": 3, "d": 64}), ("linear", {"n": 12, "m": 30, "k": 64})):
        workload = shape_workload(OPS[name], shape, "bf16")
        backend_checker(backend).check(workload)
    assert backend.checking is False
    call = backend.call

    def too_large(op: Op, ins: Any, attrs: Any) -> tuple[Array, ...]:
        outs = call(op, ins, attrs)
        outs[0][...] = (np.asarray(outs[0]).astype(np.float64) * 1.009).astype(outs[0].dtype)
        return outs

    monkeypatch.setattr(backend, "call", too_large)
    with pytest.raises(WrongResultError, match="of the result's norm"):
        backend_checker(backend).check(workload)


def test_a_kernel_that_writes_nothing_is_refused_on_a_gpu() -> None:
    with pytest.raises(WrongResultError, match="100 of 100 elements of y are wrong"):
        backend_checker(_fake_backend(emulate=False)).check(shape_workload(OPS["add"], {"n": 1, "d": 100}, "f32"))


def test_float32_is_checked_beside_16_bits_once() -> None:
    """An error of 1e-4 is nothing in bf16; in float32 it shows."""
    seen: list[Workload] = []

    def run(workload: Workload, arrays: Any) -> Outputs:
        seen.append(workload)
        return rounded(workload, [o * (1 + 1e-4) for o in expected(workload, arrays)])

    op = OPS["rms_norm"]
    with pytest.raises(WrongResultError, match=r"^rms_norm f32 "):
        Checker(run).check(shape_workload(op, {"n": 9}, "bf16"))
    seen.clear()
    prepared: list[int] = []
    checker = Checker(
        lambda w, a: seen.append(w) or rounded(w, expected(w, a)),  # type: ignore[func-returns-value]
        prepare=lambda workloads: prepared.append(len(workloads)),
    )
    for n in (2, 3):
        checker.check(shape_workload(op, {"n": n}, "bf16"))
    assert [w.dtype for w in seen] == ["bf16", *["f32"] * len(op.cases), "bf16"]
    assert prepared == [len(op.cases)]


# ---- a result that is wrong in places --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-3])
def test_one_wrong_float_is_found(value: float) -> None:
    workload, arrays, (out,) = right("rms_norm", n=3, d=8)
    out[2, 7] += value
    with pytest.raises(WrongResultError, match=r"rms_norm f32 n=3 d=8: 1 of 24 elements of y are wrong.* \[2, 7\]"):
        check(workload, arrays, [out])


def test_many_small_errors_are_found() -> None:
    workload, arrays, (out,) = right("add", n=9, d=999)
    out += 5e-7 * np.sign(np.random.default_rng(0).standard_normal(out.shape)).astype(np.float32)
    with pytest.raises(WrongResultError, match=r"of the result's norm; 2\.4e-07 is allowed"):
        check(workload, arrays, [out])


def test_the_outliers_of_an_allowed_error_are_allowed() -> None:
    """Of a million normal errors some lie five deviations out; a sum over 14,336 products was refused for that."""
    workload, arrays, (out,) = right("linear", n=999, m=1001, k=8, U="f32")
    size = float(np.sqrt(np.mean(out.astype(np.float64) ** 2)))
    tolerance = workload.op.allowed("f32", "f32")
    errors = np.random.default_rng(7).standard_normal(out.shape) * 0.9 * tolerance * size
    assert (np.abs(errors) > 3 * tolerance * (np.abs(out) + size)).any()
    check(workload, arrays, [(out + errors).astype(np.float32)])


def test_a_wrong_integer_and_a_wrong_shape_are_found() -> None:
    workload, arrays, (out,) = right("sample", b=3, V=512)
    with pytest.raises(WrongResultError, match="token has shape"):
        check(workload, arrays, [out[:1]])
    out[1] += 1
    with pytest.raises(WrongResultError, match=r"1 of 3 elements of token are wrong, the first at \[1\]"):
        check(workload, arrays, [out])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_touched_cache_is_found(dtype: str) -> None:
    """Also where nothing but a bit that no number shows has changed: the sign of a zero."""
    workload = case_workload(OPS["kv_append"], OPS["kv_append"].cases[1], dtype)
    arrays = workload.arrays()
    _, slots, _, v0 = arrays
    assert slots is not None
    assert v0 is not None
    S = workload.call["S"]
    free = next(s for s in range(workload.call["P"] * S) if s not in slots)
    v0[free // S, 0, free % S, 0] = 0
    k, v = rounded(workload, expected(workload, arrays))
    check(workload, arrays, [k, v])
    v[free // S, 0, free % S, 0] = -0.0
    with pytest.raises(WrongResultError, match="v is changed outside what the op writes: 1 elements"):
        check(workload, arrays, [k, v])


def test_what_no_sequence_has_of_the_cache_is_nan() -> None:
    """A kernel that uses it gives NaN."""
    workload = case_workload(OPS["attention"], OPS["attention"].cases[1], "f32")
    _, k, v, _, seq_lens, table, _ = workload.arrays()
    assert k is not None
    assert v is not None
    assert seq_lens is not None
    assert table is not None
    finite = np.isfinite(k).all(axis=(1, 3))
    assert np.array_equal(finite, np.isfinite(v).all(axis=(1, 3)))
    assert finite.sum() == seq_lens.sum()
    assert finite[table[0, 0]].all()


def test_large_inputs_stay_narrow_and_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = shape_workload(OPS["linear"], {"n": 2, "m": 9, "k": 64}, "bf16")
    wide = expected(workload, workload.arrays())[0]
    monkeypatch.setattr(judge, "_MAX_WIDENED", 2 * 64)
    assert np.allclose(expected(workload, workload.arrays())[0], wide, rtol=1e-12)


# ---- running ---------------------------------------------------------------------------------------------------------


class _Careless(EmulatedDevice):
    """Computes nothing, and writes an element too many into the argument ``name``."""

    name = "y"

    def launch(self, bound: BoundLaunch) -> None:
        array = bound.args[[p.name for p in bound.prototype.parameters].index(self.name)]
        np.lib.stride_tricks.as_strided(array.reshape(-1), (array.size + 1,))[array.size] = 0


def test_a_write_past_the_end_is_found() -> None:
    workload = case_workload(OPS["add"], OPS["add"].cases[0], "f32")
    with pytest.raises(WrongResultError, match="y was written outside"):
        run_guarded(workload, workload.arrays(), _Careless())


def test_scratch_that_is_not_left_zero_is_found() -> None:
    class Counting(EmulatedDevice):
        def launch(self, bound: BoundLaunch) -> None:
            bound.args[[p.name for p in bound.prototype.parameters].index("arrivals")][...] = 1

    workload = case_workload(OPS["attention"], OPS["attention"].cases[0], "f32")
    with pytest.raises(WrongResultError, match="arrivals was not left zero"):
        run_guarded(workload, workload.arrays(), Counting())


def test_outputs_and_scratch_are_poisoned() -> None:
    seen: dict[str, Any] = {}

    class Looking(EmulatedDevice):
        def launch(self, bound: BoundLaunch) -> None:
            seen.update((p.name, np.array(a)) for p, a in zip(bound.prototype.parameters, bound.args, strict=True))

    workload = case_workload(OPS["attention"], OPS["attention"].cases[0], "bf16")
    run_guarded(workload, workload.arrays(), Looking())
    assert np.isnan(seen["y"].astype(np.float32)).all()
    assert np.isnan(seen["partial"]).all()
    assert not seen["arrivals"].any()
    sample = case_workload(OPS["sample"], OPS["sample"].cases[0], "f32")
    run_guarded(sample, sample.arrays(), Looking())
    assert (seen["counts"] == 0x5A5A5A5A).all()


def test_an_op_without_kernels_cannot_be_planned() -> None:
    workload = shape_workload(replace(OPS["add"], kernels=None), {"n": 1}, "f32")
    for run in (
        lambda: planned(workload, workload.ins, Device(), lambda shape, dtype: np.empty(shape, dtype)),
        lambda: run_guarded(workload, workload.arrays(), EmulatedDevice()),
    ):
        with pytest.raises(DeviceError, match="add has no kernel of its own"):
            run()


@pytest.mark.parametrize("name", list(OPS))
def test_tolerances_are_few_roundings(name: str) -> None:
    """16-bit outputs have at most three roundings' error; nothing is looser than 2e-5 in float32, but where what is
    multiplied, or what is added up, was rounded to 16 bits within the op: once."""
    op = OPS[name]
    for T in ("f32", "f16", "bf16"):
        rounds = name.endswith(("_mul_linear_add", "_route", "_linear_combine")) and T != "f32"
        assert op.allowed("f32", T) <= (ROUNDING[T] if rounds else 2e-5)
        assert op.allowed(T, T) <= 3 * ROUNDING[T] or T == "f32"
    assert op.allowed("bf16", "bf16") < 9e-3
    assert {k.split(":")[-1] for k in op.tolerance} <= set(ROUNDING) <= set(DTYPES)
