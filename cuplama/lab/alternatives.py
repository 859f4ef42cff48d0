"""What else could compute a workload, and how long that takes: cuBLAS for a product, CuPy for an elementwise op."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array, dtype_name
from ..ops.op import Op
from ..ops.weights import segments_of
from .timing import REPLAYS, Body, Replay, Spread
from .workloads import Workload, normal_values

__all__ = ["alternative"]

_MANY_BYTES = 256 << 20  # of weights to go through, several times a cache


def alternative(
    backend: Backend, workload: Workload, ins: Sequence[Sequence[Array | None]]
) -> tuple[str, Spread] | None:
    """What else could be used there, and its time; None where nothing is obvious, or where it does not work.

    A matrix product alone by cuBLAS, without the norm, activation or sum that a fused op has, unless the op always is
    one; else the op's own ``library`` call. ins: copies of the inputs, which are gone through in turn.
    """
    if backend.name != "cuda":
        return None
    gpu: Any = backend.gpu  # type: ignore[attr-defined]
    weight = _one_weight(workload.op)
    if weight is not None and (workload.op.matmul is None or workload.op.matmul.streamed):
        return _product(backend, gpu, workload, [given[weight] for given in ins])
    library = workload.op.library
    if library is None:
        return None
    spec = workload.op.signature.outs[0]
    y = backend.zeros(workload.call.shape(spec), workload.call.dtype(spec))

    def body(given: Sequence[Array | None]) -> Body:
        return lambda: library(y, *given)

    try:
        with gpu:
            return "CuPy", Replay(backend, [body(given) for given in ins]).seconds(REPLAYS)
    except Exception as e:  # CuPy refuses a dtype in more than one way; the kernel's own time does not depend on it
        print(f"{workload.label}: CuPy cannot do it ({type(e).__name__}: {e})", file=sys.stderr)
        return None


def _one_weight(op: Op) -> int | None:
    """Which input of an op is the weight of its product; None if there is none, or one of several experts."""
    weights = (i for i, s in enumerate(op.signature.ins) if s.name == "w" and s.dtype == "W" and len(s.dims or ()) == 2)
    return next(weights, None)


def _product(backend: Backend, gpu: Any, workload: Workload, weights: Sequence[Any]) -> tuple[str, Spread] | None:
    """x w^T by cuBLAS on each of the weights [m, k], in the dtypes of the workload; on plain ones for packed ones."""
    if gpu.cublas is None:
        return None
    n, (m, k), T = workload.call["n"], weights[0].shape, dtype_name(workload.call.dtypes["T"])
    if segments_of(weights[0]) is not None:
        plain = normal_values(np.random.default_rng(3), (m, k), DTYPES[T], k**-0.5)
        weights = [backend.upload(plain) for _ in range(min(len(weights), -(-_MANY_BYTES // plain.nbytes)))]
    x = backend.upload(normal_values(np.random.default_rng(2), (n, k), DTYPES[T], 1.0))
    U = dtype_name(workload.call.dtype(workload.op.signature.outs[0]))
    y = backend.zeros((n, m), DTYPES[U])
    product = gpu.cublas.product(n, m, k, T, U)
    if product is None:
        return None

    def body(w: Array) -> Body:
        addresses = (gpu.address(x), gpu.address(w), gpu.address(y))
        return lambda: product(*addresses)

    return "cuBLAS", Replay(backend, [body(w) for w in weights]).seconds(REPLAYS)
