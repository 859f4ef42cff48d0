"""The one judge of a kernel's result, for the lab and for the tests.

It holds every element of every output against the reference in float64, which gets the inputs as they are, rounded to
the model's dtype: so it judges the arithmetic, not the rounding of the inputs. Integers must be equal. Floats are
measured in units of their own dtype's rounding (``Op.tolerance``):

- the norm of the error, relative to the norm of the result, is at most the tolerance;
- at most half of that may be a common factor: rounding errors have either sign, a kernel that is too large everywhere
  has not;
- a single element may be off by six times the tolerance of its own size and the output's root mean square together: of
  millions of elements some lie five deviations out;
- what the op leaves alone in an array that it updates in place keeps its bits.

Kernels run on outputs and scratch full of NaN (integers: a sentinel), between guard zones: an element that is not
written, or written past the end, is found. Scratch that must be left zero is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array, dtype_name
from ..errors import CuplamaError, DeviceError, ParameterError
from ..ops.abstract import abstract
from ..ops.binding import BoundLaunch, bind_plan
from ..ops.launch import Device, Plan
from ..ops.linear import MAX_STREAMED_ROWS
from ..ops.op import ROUNDING, Call, Op
from ..ops.signature import OpError
from ..ops.weights import segments_of
from .workloads import Workload, case_workloads

__all__ = [
    "BackendExecutor",
    "Checker",
    "Executor",
    "Run",
    "WrongResultError",
    "backend_checker",
    "check",
    "check_launches",
    "expected",
    "model_dtypes",
    "planned",
    "poison",
    "relative_error",
    "run_guarded",
    "uploaded",
]

_MAX_GRID = (2**31 - 1, 65535, 65535)  # blocks (CUDA C++ programming guide, technical specifications)
_MAX_WIDENED = 1 << 24  # Inputs of more elements stay as they are: the references widen what they take of them.
_ROUNDINGS = 2  # of a packed weight, where it is multiplied with many rows: of its scale and of the product
_MAX_FACTOR = 0.5  # of the tolerance: what may be common to all elements
_FACTOR_DEVIATIONS = 4  # Of few elements, chance makes a common factor of about the error / sqrt(elements).
_MAX_OUTLIER = 6  # times the tolerance, for a single element
_SENTINEL = 0x5A5A5A5A  # in integer outputs before a run
_GUARD = 256  # bytes before and after each output: a multiple of every alignment that kernels ask for

Arrays = Sequence[np.ndarray[Any, Any] | None]
Outputs = list[np.ndarray[Any, Any]]
Run = Callable[[Workload, Arrays], Outputs]
"""A way to compute a workload's outputs from its inputs on the host."""


class WrongResultError(CuplamaError):
    """A kernel computes something else than its reference. Names op, shape, output and the first wrong element."""


class Executor(Protocol):
    """Runs launches on arrays of its own."""

    device: Device

    def upload(self, array: np.ndarray[Any, Any]) -> Array: ...
    def download(self, array: Array) -> np.ndarray[Any, Any]: ...
    def launch(self, bound: BoundLaunch) -> None: ...


def model_dtypes(op: Op) -> tuple[str, ...]:
    """The dtypes that a model may give the op, the narrowest last; one if its signature does not leave it open."""
    left_open = any(s.dtype not in DTYPES for s in (*op.signature.ins, *op.signature.outs))
    return ("f32", "f16", "bf16") if left_open else ("f32",)


# ---- judging ---------------------------------------------------------------------------------------------------------


def expected(workload: Workload, arrays: Arrays) -> Outputs:
    """What the reference says, in float64 where the outputs are floats. The arrays are not changed."""
    signature = workload.op.signature
    exact = all(workload.call.dtype(s).kind in "iu" for s in signature.outs)
    ins: list[Any] = []
    for spec, x in zip(signature.ins, arrays, strict=False):
        if segments_of(x) is not None:
            ins.append(x)
        elif x is not None and not exact and _model_floats(x) and x.size <= _MAX_WIDENED:
            ins.append(x.astype(np.float64))
        else:
            ins.append(x.copy() if x is not None and spec.name in signature.in_place else x)
    out = workload.op.reference(*ins, **workload.attrs)
    return list(out) if isinstance(out, tuple) else [out]


def _model_floats(x: np.ndarray[Any, Any]) -> bool:
    """Whether an array holds floats in a model's dtype. An e4m3 cache does not: what is put into it is rounded."""
    return x.dtype.kind not in "iu" and x.dtype != DTYPES["e4m3"]


def check(workload: Workload, arrays: Arrays, outs: Outputs, wanted: Outputs | None = None) -> None:
    """Compare every element of every output with the reference. Raises WrongResultError.

    wanted: what ``expected`` gave, if it is there already.
    """
    op, before = workload.op, dict(zip((s.name for s in workload.op.signature.ins), arrays, strict=False))
    wanted = expected(workload, arrays) if wanted is None else wanted
    for spec, out, want in zip(op.signature.outs, outs, wanted, strict=True):
        if out.shape != want.shape:
            raise WrongResultError(f"{workload.label}: {spec.name} has shape {out.shape}, not {want.shape}")
        if out.dtype.kind in "iu":
            _refuse(workload, spec.name, out != want, out, want)
            continue
        _check_floats(workload, spec.name, out, want)
        if (old := before.get(spec.name)) is not None:
            _check_untouched(workload, spec.name, old, out, want)


def relative_error(out: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """The norm of the error over the norm of the result, of the elements whose result is finite."""
    finite = np.isfinite(want.astype(np.float64))
    o, w = (np.where(finite, a.astype(np.float64), 0).ravel() for a in (out, want))
    return float(np.linalg.norm(o - w)) / max(float(np.linalg.norm(w)), 1e-30)


def _check_floats(workload: Workload, name: str, out: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    own = workload.op.allowed(dtype_name(out.dtype), workload.dtype)
    tolerance = own + _rounded_weights(workload)
    out, want = out.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    size = np.where(finite, np.abs(want), 0)
    with np.errstate(invalid="ignore"):
        error = np.abs(out - want)
    typical = float(np.sqrt(np.mean(size * size))) if size.size else 0.0
    same = (out == want) | (np.isnan(out) & np.isnan(want))
    _refuse(workload, name, np.where(finite, ~(error <= _MAX_OUTLIER * tolerance * (size + typical)), ~same), out, want)
    where = f"{workload.label}: {name}:"
    relative = relative_error(out, want)
    if not relative <= tolerance:
        raise WrongResultError(f"{where} the error is {relative:.1e} of the result's norm; {tolerance:.1e} is allowed")
    factor, allowed = _common_factor(np.where(finite, out, 0), np.where(finite, want, 0), own, tolerance)
    if abs(factor) > allowed:
        raise WrongResultError(
            f"{where} all of it is too {'large' if factor > 0 else 'small'} by {abs(factor):.1e} of its size;"
            f" {allowed:.1e} is allowed"
        )


def _rounded_weights(workload: Workload) -> float:
    """What the result may be off, as a norm, because a packed weight's numbers are rounded to the model's dtype.

    For more rows than are streamed that is done: scale and number are rounded, once each at most. For few rows the
    product is scaled behind the sum, and only the numbers of nf4 are not exact in 16 bits.
    """
    segments = [s for x in workload.call.arrays.values() for s in segments_of(x) or ()]
    if not segments or workload.dtype == "f32":
        return 0.0
    streamed = workload.op.matmul is None or workload.op.matmul.streamed
    if not streamed or (workload.call.env.get("n", 0) > MAX_STREAMED_ROWS and "k" in workload.call.env):
        return _ROUNDINGS * ROUNDING[workload.dtype]
    return ROUNDING[workload.dtype] * any(s.format.packing.code.name == "nf4" for s in segments)


def _common_factor(
    out: np.ndarray[Any, Any], want: np.ndarray[Any, Any], own: float, tolerance: float
) -> tuple[float, float]:
    """How much too large the output is as a whole (of the factors that bring ``want`` near it the best, less one), and
    how much it may be. Where few elements make up the norm, chance may bring about more.

    own: the op's tolerance, without that of rounded weights: those are too large as often as too small.
    """
    squares = want * want
    total = float(squares.sum())
    if not total:
        return 0.0, tolerance
    factor = float(((out - want) * want).sum()) / total
    elements = total * total / float((squares * squares).sum())  # those that count: all of them if they are alike
    return factor, max(own * _MAX_FACTOR, tolerance * _FACTOR_DEVIATIONS / math.sqrt(elements))


def _check_untouched(workload: Workload, name: str, old: Any, out: Any, want: Any) -> None:
    """Where the reference leaves an element of an array in place as it was, its bits must be as they were."""
    now, was = (a.astype(np.float64) for a in (want, old))
    kept = ((now == was) & (np.signbit(now) == np.signbit(was))) | (np.isnan(now) & np.isnan(was))
    moved = kept & (_bits(out) != _bits(old))
    if moved.any():
        at = _first(moved)
        raise WrongResultError(
            f"{workload.label}: {name} is changed outside what the op writes: {int(moved.sum())} elements, the first at"
            f" {list(at)}: {out[at]:g}, was {old[at]:g}"
        )


def _refuse(workload: Workload, name: str, wrong: Any, out: Any, want: Any) -> None:
    if wrong.any():
        at = _first(wrong)
        raise WrongResultError(
            f"{workload.label}: {int(wrong.sum())} of {wrong.size} elements of {name} are wrong, the first at"
            f" {list(at)}: {out[at]:g}, not {want[at]:g}"
        )


def _first(wrong: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return tuple(int(i[0]) for i in np.nonzero(wrong))


def _bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


# ---- running ---------------------------------------------------------------------------------------------------------


def planned(
    workload: Workload,
    ins: Sequence[Array | None],
    device: Device,
    empty: Callable[[tuple[int, ...], np.dtype[Any]], Array],
) -> tuple[list[BoundLaunch], list[Array]]:
    """The op's own launches on these arrays, and the arrays that will hold the outputs.

    empty: makes outputs and scratch; descriptions of arrays will do where nothing is run. Raises DeviceError for an op
    without kernels, OpError for a shape that they do not take.
    """
    op = workload.op
    call = workload.bind(ins)

    def make(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return empty(shape, dtype)

    bound = bind_plan(_plan(call, device), call, make, make)
    return bound, [call.arrays[s.name] for s in op.signature.outs]


def _plan(call: Call, device: Device) -> Plan:
    """The op's own launches. Raises DeviceError for an op without kernels."""
    if call.op.kernels is None:
        raise DeviceError(f"{call.op.name} has no kernel of its own; it runs as its parts")
    return call.op.kernels(call, device)


def check_launches(workload: Workload, device: Device) -> None:
    """Plan the op's own launches. Raises ParameterError for a shape that they do not take or no grid can hold."""
    if workload.op.kernels is None:
        return
    try:
        launches = planned(workload, workload.ins, device, abstract)[0]
    except OpError as e:
        raise ParameterError(str(e)) from None
    except (MemoryError, OverflowError) as e:
        raise ParameterError(f"{workload.label}: the shape is too large: {e}") from None
    for launch in launches:
        if any(not 1 <= size <= largest for size, largest in zip(launch.grid, _MAX_GRID, strict=True)):
            raise ParameterError(
                f"{workload.label}: the shape is too large: {launch.expression} needs grid {launch.grid}"
            )


def poison(dtype: np.dtype[Any]) -> Any:
    """What memory holds before a run: NaN, or a number that no kernel computes."""
    return _SENTINEL if dtype.kind in "iu" else np.nan


def run_guarded(workload: Workload, arrays: Arrays, executor: Executor) -> Outputs:
    """Run the op's own kernels on poisoned memory between guard zones, and return the outputs.

    Raises WrongResultError if a guard zone was written, or scratch that holds zeros was not left so.
    """
    op = workload.op
    call = workload.bind([None if x is None else executor.upload(_own(x)) for x in arrays])
    plan = _plan(call, executor.device)
    zones: dict[str, Array] = {}

    def place(name: str, content: np.ndarray[Any, Any]) -> Array:
        zones[name], array = _guarded(content, executor)
        return array

    for spec, x in zip(op.signature.ins, arrays, strict=False):
        if spec.name in op.signature.in_place and x is not None:
            call.arrays[spec.name] = place(spec.name, x)
    bound = bind_plan(
        plan,
        call,
        empty=lambda name, shape, dtype: place(name, np.full(shape, poison(dtype), dtype)),
        zeros=lambda name, shape, dtype: place(name, np.zeros(shape, dtype)),
    )
    for launch in bound:
        executor.launch(launch)
    for name, zone in zones.items():
        content = executor.download(zone)
        edges = np.concatenate([content[:_GUARD], content[-_GUARD:]])
        if not (edges == 0x5A).all():
            raise WrongResultError(f"{workload.label}: {name} was written outside its bounds")
        if name in plan.zeroed and content[_GUARD : _GUARD + _size(plan.scratch[name])].any():
            raise WrongResultError(f"{workload.label}: {name} was not left zero")
    return [executor.download(call.arrays[s.name]) for s in op.signature.outs]


def _own(x: Array) -> Array:
    """A copy of an array; a quantised weight, which no op writes, as it is."""
    return x if segments_of(x) is not None else x.copy()


def _size(scratch: tuple[tuple[int, ...], str]) -> int:
    return math.prod(scratch[0]) * DTYPES[scratch[1]].itemsize


def _guarded(content: np.ndarray[Any, Any], executor: Executor) -> tuple[Array, Array]:
    """The bytes of an array between two guard zones, on the executor, and the array in them."""
    size = content.nbytes
    zone = np.full(-(-size // 16) * 16 + 2 * _GUARD, 0x5A, np.uint8)
    zone[_GUARD : _GUARD + size] = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
    placed = executor.upload(zone)
    return placed, placed[_GUARD : _GUARD + size].view(content.dtype).reshape(content.shape)


# ---- checking --------------------------------------------------------------------------------------------------------


class Checker:
    """Checks workloads by one or more ways to run them. Of an op in 16 bits it also checks the cases in float32, once:
    there an error shows that rounding to 16 bits hides."""

    def __init__(self, *runs: Run, prepare: Callable[[Sequence[Workload]], None] = lambda workloads: None) -> None:
        self._runs, self._prepare = runs, prepare
        self._seen: set[Op] = set()

    def check(self, workload: Workload, arrays: Arrays | None = None) -> None:
        """Raises WrongResultError. arrays: the inputs, by default those of ``workload.arrays``."""
        self._check(workload, workload.arrays() if arrays is None else arrays)
        if workload.dtype == "f32" or workload.op in self._seen or len(model_dtypes(workload.op)) == 1:
            return
        self._seen.add(workload.op)
        exact = case_workloads(workload.op, "f32")
        self._prepare(exact)
        for one in exact:
            self._check(one, one.arrays())

    def _check(self, workload: Workload, arrays: Arrays) -> None:
        wanted = expected(workload, arrays)
        for run in self._runs:
            check(workload, arrays, run(workload, arrays), wanted)


class BackendExecutor:
    """Launches on a CUDA backend's stream and memory."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.device = backend, backend.gpu.limits

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        return self._backend.upload(array)

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._backend.download(array)
        return found

    def launch(self, bound: BoundLaunch) -> None:
        with self._backend.gpu as gpu:
            gpu.function(bound.file, bound.expression, bound.shared)(bound.grid, bound.block, bound.args, bound.shared)


def backend_checker(backend: Any) -> Checker:
    """Checks on a CUDA backend: the op as a model runs it, on poisoned outputs, and its kernels between guard zones."""

    def called(workload: Workload, arrays: Arrays) -> Outputs:
        checking, backend.checking = backend.checking, True
        try:
            outs = backend.call(workload.op, uploaded(backend, arrays), workload.attrs)
            return [backend.download(a) for a in outs]
        finally:
            backend.checking = checking

    executor = BackendExecutor(backend)

    def alone(workload: Workload, arrays: Arrays) -> Outputs:
        return run_guarded(workload, arrays, executor)

    return Checker(called, alone)


def uploaded(backend: Backend, arrays: Arrays) -> list[Array | None]:
    """The arrays on the backend; None stays None."""
    return [None if x is None else backend.upload(x) for x in arrays]
