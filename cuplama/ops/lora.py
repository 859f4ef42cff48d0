"""Low-rank adapters of a product. Kernels: cuda_src/lora.cu. Hu et al., "LoRA", arXiv:2106.09685.

An adapter adds scale * B (A x) to a product y = W x. h = A x is a product like any other; this is what comes behind.
A stacked matrix, such as that of q, k and v, has an adapter for each part: their A's are stacked, so h has r columns
for each part, and ``part[j]`` says which of them row j of the stacked B's takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .linear import PRODUCT_TOLERANCE
from .op import Draw, Op

__all__ = ["lora_add", "lora_backward_b", "lora_backward_h"]


def _lora_add(a: Array, h: Array, b: Array, part: Array, *, q: int, scale: float, U: str = "") -> Array:
    y, h, b = np.array(upcast(a)), upcast(h), upcast(b)
    r = b.shape[1]
    for i in np.unique(part):
        rows = part == i
        y[:, rows] += (h[:, i * r : (i + 1) * r] @ b[rows].T) * y.dtype.type(scale)
    return y


def _lora_backward_h(dy: Array, b: Array, part: Array, *, q: int, scale: float) -> Array:
    dy, b = upcast(dy), upcast(b)
    r = b.shape[1]
    dh = np.zeros((len(dy), q), dy.dtype)
    for i in np.unique(part):
        rows = part == i
        dh[:, i * r : (i + 1) * r] = (dy[:, rows] @ b[rows]) * dy.dtype.type(scale)
    return dh


def _lora_backward_b(db: Array, dy: Array, h: Array, part: Array, *, scale: float) -> Array:
    dy, h = upcast(dy), upcast(h)
    r = db.shape[1]
    for i in np.unique(part):
        rows = part == i
        db[rows] += (dy[:, rows].T @ h[:, i * r : (i + 1) * r]) * dy.dtype.type(scale)
    return db


def _inputs(rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """The parts of a stack lie one behind the other."""
    parts = case["q"] // case["r"]
    return {"part": (np.arange(case["m"]) * parts // case["m"]).astype(np.int32)}


def _gradient(g: Gradient) -> None:
    dy, scale = g.rounded("y"), g.attr("scale")
    if g.wants("b"):
        db = g.into("b")
        g.update("lora_backward_b", (db,), (db, dy, g["h"], g["part"]), scale=scale)
    if g.wants("h"):
        g.give("h", g.emit("lora_backward_h", dy, g["b"], g["part"], q=g.attr("q"), scale=scale))
    if g.wants("a"):
        g.give("a", g.of("y"))


def _sizes(draw: Draw) -> dict[str, Any]:
    r, parts = draw(1, 40), draw(1, 3)
    return dict(n=draw(1, 20), m=parts * draw(1, 90), q=parts * r, r=r, scale=0.5, U=("T", "f32")[draw(0, 1)])


_CASES = [
    dict(n=n, m=m, q=parts * r, r=r, scale=0.5, U=U)
    for n, m, r, parts, U in ((1, 8, 4, 1, "T"), (3, 33, 8, 3, "f32"), (20, 96, 16, 2, "T"), (9, 130, 5, 1, "f32"))
]

lora_add = Op(
    "lora_add",
    "y[n,m]:U = (a[n,m]:U, h[n,q]:T, b[m,r]:T, part[m]:i32, q:i32, scale:f32)",
    doc="y[i,j] = a[i,j] + scale sum_l h[i, part[j] r + l] b[j,l]",
    reference=_lora_add,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
    gradient=_gradient,
    recompute="layers",
)

lora_backward_h = Op(
    "lora_backward_h",
    "dh[n,q]:T = (dy[n,m]:T, b[m,r]:T, part[m]:i32, q:i32, scale:f32)",
    doc="dh[i, p r + l] = scale sum of dy[i,j] b[j,l] over the j with part[j] = p",
    reference=_lora_backward_h,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
)

lora_backward_b = Op(
    "lora_backward_b",
    "db[m,r]:f32 = (db[m,r]:f32, dy[n,m]:T, h[n,q]:T, part[m]:i32, scale:f32)",
    doc="db[j,l] += scale sum_i dy[i,j] h[i, part[j] r + l]",
    reference=_lora_backward_b,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
)
