"""TODO: lab.check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array, dtype_name
from ..errors import CuplamaError, DeviceError, ParameterError
from ..ops import launch as kernel
from ..ops.abstract import abstract
from ..ops.launch import BoundLaunch, Device
from ..ops.signature import OpError
from .cases import Case

__all__ = ["TOLERANCE", "WrongResultError", "check", "check_launches", "check_on", "expected", "planned"]

TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}  # of the error's norm, by the output's dtype
_GRID = (2**31 - 1, 65535, 65535)  # blocks at most (CUDA C++ programming guide, technical specifications)
_WIDEN = 1 << 24  # inputs of more elements stay as they are: the references widen what they take of them


class WrongResultError(CuplamaError):
    """A kernel computes something else than its reference. Names op, shape, output and the first wrong element."""


def expected(case: Case, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
    """What the reference says, in float64 where the outputs are floats. The arrays are not changed."""
    signature = case.op.signature
    exact = all(case.call.dtype(s).kind in "iu" for s in signature.outs)
    ins: list[Any] = []
    for spec, x in zip(signature.ins, arrays, strict=False):
        if x is not None and not exact and x.dtype.kind not in "iu" and x.size <= _WIDEN:
            ins.append(x.astype(np.float64))
        else:
            ins.append(x.copy() if x is not None and spec.name in signature.in_place else x)
    out = case.op.reference(*ins, **case.attrs)
    return list(out) if isinstance(out, tuple) else [out]


def check(case: Case, arrays: Sequence[np.ndarray[Any, Any] | None], outs: Sequence[np.ndarray[Any, Any]]) -> None:
    """Compare every element of every output with the reference. Raises WrongResultError.

    Integers must be equal. Of floats the norm of the error is held to the output dtype's tolerance, a single element to
    six times that of its own size and the outputs' mean size together: of millions, some lie five deviations out.
    """
    for spec, out, want in zip(case.op.signature.outs, outs, expected(case, arrays), strict=True):
        if out.shape != want.shape:
            raise WrongResultError(f"{case.label}: {spec.name} has shape {out.shape}, not {want.shape}")
        if out.dtype.kind in "iu":
            wrong = out != want
        else:
            tolerance = TOLERANCE[dtype_name(out.dtype)]
            out, want = out.astype(np.float64), want.astype(np.float64)
            finite = np.isfinite(want)
            size = np.where(finite, np.abs(want), 0)
            with np.errstate(invalid="ignore"):
                error = np.abs(out - want)
            typical = float(np.sqrt(np.mean(size * size))) if size.size else 0.0
            wrong = np.where(finite, ~(error <= 6 * tolerance * (size + typical)), out != want)
            norm = float(np.linalg.norm(np.where(finite, error, 0)))
            if not wrong.any() and not norm <= tolerance * max(float(np.linalg.norm(size)), 1e-30):
                raise WrongResultError(
                    f"{case.label}: {spec.name}: the error is {norm / max(float(np.linalg.norm(size)), 1e-30):.1e}"
                    f" of the result's norm; {tolerance:g} is allowed"
                )
        if wrong.any():
            at = tuple(int(i[0]) for i in np.nonzero(wrong))
            raise WrongResultError(
                f"{case.label}: {int(wrong.sum())} of {wrong.size} elements of {spec.name} are wrong, the first at"
                f" {list(at)}: {out[at]:g}, not {want[at]:g}"
            )


def planned(
    case: Case, ins: Sequence[Array | None], device: Device, empty: Callable[[tuple[int, ...], np.dtype[Any]], Array]
) -> tuple[list[BoundLaunch], list[Array]]:
    """The op's own launches on these arrays, and the arrays that will hold the outputs, all in host memory.

    empty: makes outputs and scratch; descriptions of arrays will do where nothing is run.
    """
    op = case.op
    if op.kernels is None:
        raise DeviceError(f"{op.name} has no kernel of its own; it runs as its parts")
    call = case.bind(ins)
    plan = op.kernels(call, device)
    for spec in op.signature.outs:
        if spec.name not in op.signature.in_place:
            call.arrays[spec.name] = empty(call.shape(spec), call.dtype(spec))
    scratch = {}
    for name, (shape, dtype) in plan.scratch.items():
        scratch[name] = (np.zeros if name in plan.zeroed else empty)(shape, DTYPES[dtype])
    bound = [kernel.bind(launch, call, scratch) for launch in plan.launches]
    return bound, [call.arrays[s.name] for s in op.signature.outs]


def check_launches(case: Case, device: Device) -> None:
    """Plan the op's own launches. Raises ParameterError for a shape that they do not take or no grid can hold."""
    if case.op.kernels is None:
        return
    try:
        launches = planned(case, case.ins, device, abstract)[0]
    except OpError as e:
        raise ParameterError(str(e)) from None
    except (MemoryError, OverflowError) as e:
        raise ParameterError(f"{case.label}: the shape is too large: {e}") from None
    for launch in launches:
        if any(not 1 <= size <= most for size, most in zip(launch.grid, _GRID, strict=True)):
            raise ParameterError(f"{case.label}: the shape is too large: {launch.expression} needs grid {launch.grid}")


def check_on(backend: Backend, case: Case, arrays: Sequence[np.ndarray[Any, Any] | None]) -> None:
    """Run the op as a model does, its outputs poisoned before, and compare. Raises WrongResultError."""
    checking, backend._check = backend._check, True  # type: ignore[attr-defined]
    try:
        outs = backend.call(case.op, uploaded(backend, arrays), case.attrs)
        check(case, arrays, [backend.download(a) for a in outs])
    finally:
        backend._check = checking  # type: ignore[attr-defined]


def uploaded(backend: Backend, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[Array | None]:
    return [None if x is None else backend.upload(x) for x in arrays]
