"""Dropout of the residual stream. Kernel: cuda_src/dropout.cu. Srivastava et al., JMLR 15 (2014)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import Call, Op
from .sampling import philox

__all__ = ["dropout"]


def _dropout(x: Array, seed: Array, *, p: float, stream: int) -> Array:
    counter = np.zeros((-(-x.size // 4), 4), np.uint32)
    counter[:, 0], counter[:, 1] = np.arange(len(counter)), stream
    word = philox(counter, int(seed[0]) | int(seed[1]) << 32).reshape(-1)[: x.size].reshape(x.shape)
    return np.where(word < _threshold(p), x.dtype.type(0), x * x.dtype.type(1 / (1 - p)))


def _threshold(p: float) -> np.uint32:
    """Below it lie as many of all words as are to be left out."""
    return np.uint32(min(p * 2.0**32, 2.0**32 - 1))


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    return {"seed": rng.integers(0, 2**32, 2, dtype=np.uint32)}


def _gradient(g: Gradient) -> None:
    """What was left out has no part in the result; the same numbers are drawn again."""
    g.give("x", g.emit("dropout", g.of("y"), g["seed"], p=g.attr("p"), stream=g.attr("stream")))


_THREADS = 256


def _kernels(call: Call, device: Device) -> Plan:
    constants = {"threshold": _threshold(call["p"]), "scale": 1 / (1 - call["p"])}
    grid = (-(-call["n"] * call["d"] // (4 * _THREADS)),)
    return Plan((Launch("dropout.cu:dropout", grid, (_THREADS,), constants=constants),))


dropout = Op(
    "dropout",
    "y[n,d]:f32 = (x[n,d]:f32, seed[2]:u32, p:f32, stream:i32)",
    doc="y = x / (1 - p), or 0 with probability p. Element e draws word e % 4 of Philox 4x32-10 with the counter"
    " (e // 4, stream, 0, 0) and the key seed; it is left out where the word is below p 2^32.",
    reference=_dropout,
    kernels=_kernels,
    cases=[dict(n=n, d=d, p=p, stream=s) for n, d, p, s in ((1, 8, 0.5, 0), (3, 33, 0.1, 7), (5, 896, 0.2, 3))],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000), p=0.01 * draw(1, 99), stream=draw(0, 99)),
    inputs=_inputs,
    ranges={"seed": "2**31"},
    gradient=_gradient,
    recompute="cheap",
    flops=lambda c: c["n"] * c["d"],
)
