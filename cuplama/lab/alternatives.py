"""TODO: lab.alternatives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array, dtype_name
from .cases import Case, normal_values
from .peaks import Spread
from .timing import _REPLAYS, Body, Replay

__all__ = ["alternative"]


def alternative(backend: Backend, case: Case, ins: Sequence[Sequence[Array | None]]) -> tuple[str, Spread] | None:
    """What else could be used there, and its time; None where nothing is obvious, or where it does not work.

    A matrix product alone by cuBLAS, without the norm, activation or sum that a fused op has; CuPy for elementwise ops.
    """
    gpu: Any = getattr(backend, "gpu", None)
    by_name = {spec.name: x for spec, x in zip(case.op.signature.ins, ins[0], strict=False) if x is not None}
    at = {spec.name: i for i, spec in enumerate(case.op.signature.ins)}
    if "w" in by_name and by_name["w"].ndim == 2:
        if gpu is None or gpu.cublas is None:
            return None
        n, (m, k), T = case.call["n"], by_name["w"].shape, dtype_name(by_name["w"].dtype)
        x = backend.upload(normal_values(np.random.default_rng(2), (n, k), DTYPES[T], 1.0))
        U = dtype_name(case.call.dtype(case.op.signature.outs[0]))
        y = backend.zeros((n, m), DTYPES[U])

        product = gpu.cublas.product(n, m, k, T, U)
        if product is None:
            return None

        def multiply(given: Sequence[Array | None]) -> Body:
            addresses = (gpu.address(x), gpu.address(given[at["w"]]), gpu.address(y))
            return lambda: product(*addresses)

        return "cuBLAS", Replay(backend, [multiply(given) for given in ins]).seconds(_REPLAYS)
    if backend.name != "cuda" or case.op.name not in _CUPY:
        return None
    spec = case.op.signature.outs[0]
    y = backend.zeros(case.call.shape(spec), case.call.dtype(spec))
    work = _CUPY[case.op.name]

    def elementwise(given: Sequence[Array | None]) -> Body:
        return lambda: work(y, *given)

    try:
        with gpu:
            return "CuPy", Replay(backend, [elementwise(given) for given in ins]).seconds(_REPLAYS)
    except Exception as e:  # CuPy refuses a dtype in more than one way; the kernel's own time does not depend on it
        print(f"{case.label}: CuPy cannot do it ({type(e).__name__}: {e})", file=sys.stderr)
        return None


def _cupy_add(y: Array, a: Array, b: Array) -> None:
    import cupy

    cupy.add(a, b, out=y)


def _cupy_select_rows(y: Array, x: Array, rows: Array) -> None:
    import cupy

    cupy.take(x, rows, axis=0, out=y)


@cache
def _elementwise(parameters: str, text: str, name: str) -> Any:
    import cupy

    return cupy.ElementwiseKernel(parameters, "T y", text, name)


def _cupy_silu_mul(y: Array, x: Array) -> None:
    f = y.shape[1]
    text = "float a = (float)g; y = (T)(a / (1.0f + expf(-a)) * (float)u)"
    _elementwise("T g, T u", text, "lab_silu_mul")(x[:, :f], x[:, f:], y)


def _cupy_gelu_tanh(y: Array, x: Array) -> None:
    text = "float a = (float)x; y = (T)(0.5f * a * (1.0f + tanhf(0.79788456f * (a + 0.044715f * a * a * a))))"
    _elementwise("T x", text, "lab_gelu_tanh")(x, y)


_CUPY: Mapping[str, Callable[..., None]] = {
    "add": _cupy_add,
    "select_rows": _cupy_select_rows,
    "silu_mul": _cupy_silu_mul,
    "gelu_tanh": _cupy_gelu_tanh,
}
