"""Low-rank adapters of a product. Kernels: cuda_src/lora.cu. Hu et al., "LoRA", arXiv:2106.09685.

An adapter adds scale * B (A x) to a product y = W x. h = A x is a product like any other; this is what comes behind.
A stacked matrix, such as that of q, k and v, has an adapter for each part: their A's are stacked, so h has r columns
for each part, and ``part[j]`` says which of them row j of the stacked B's takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .linear import PRODUCT_TOLERANCE
from .op import Call, Draw, Op

__all__ = ["lora_add", "lora_backward_b", "lora_backward_h"]

_FEW = 64  # rows up to which lora_add takes them eight at a time, without tiles
_FEW_THREADS, _FEW_RANK = 128, 256  # a row of b has at most 32 lanes, 8 elements each
_TILE, _SIDE = 64, 16  # rows of a tile, and its threads side by side
_BLOCKS = 512  # that a sum is cut into pieces for: a few for each multiprocessor, the same on every GPU
_PIECE = 512  # elements of a piece of a sum at least


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


def _add_kernels(call: Call, device: Device) -> Plan:
    n, m, r = call["n"], call["m"], call["r"]
    if n <= _FEW and r <= _FEW_RANK:
        lanes, rows = _power(-(-r // 8)), _power(min(n, 8))
        grid = (-(-m * lanes // _FEW_THREADS), -(-n // rows))
        return Plan((Launch("lora.cu:lora_add_few", grid, (_FEW_THREADS,), constants={"LANES": lanes, "ROWS": rows}),))
    grid = (-(-m // (4 * _SIDE)), -(-n // _TILE))
    return Plan((Launch("lora.cu:lora_add", grid, (_SIDE * _SIDE,)),))


def _power(x: int) -> int:
    """The least power of two that is not less."""
    return 1 << (x - 1).bit_length()


def _backward_h_kernels(call: Call, device: Device) -> Plan:
    n, m, q, r = (call[name] for name in "nmqr")
    columns = 1 if r <= _SIDE else 2 if r <= 2 * _SIDE else 4
    grid = (-(-n // _TILE), -(-r // (_SIDE * columns)) * (q // r))
    return _in_pieces(call, "lora_backward_h", "lora_sum_h", grid, columns, (n, q), m * r // q)


def _backward_b_kernels(call: Call, device: Device) -> Plan:
    n, m, r = (call[name] for name in "nmr")
    columns = 1 if r <= _SIDE else 2 if r <= 2 * _SIDE else 4
    grid = (-(-m // _TILE), -(-r // (_SIDE * columns)))
    return _in_pieces(call, "lora_backward_b", "lora_sum_b", grid, columns, (m, r), n)


def _in_pieces(
    call: Call, kernel: str, adding: str, tiles: tuple[int, int], columns: int, shape: tuple[int, int], length: int
) -> Plan:
    """A product whose tiles have few blocks and long sums, and the sum of its pieces. length: of a sum."""
    pieces = max(1, min(_BLOCKS // math.prod(tiles), length // _PIECE))
    first = Launch(f"lora.cu:{kernel}", (*tiles, pieces), (_SIDE * _SIDE,), constants={"C": columns})
    second = Launch(f"lora.cu:{adding}", (-(-math.prod(shape) // 1024),), (256,), constants={"pieces": pieces})
    return Plan((first, second), {"partial": ((pieces, *shape), "f32")})


def _sizes(draw: Draw) -> dict[str, Any]:
    r, parts = draw(1, 40), draw(1, 3)
    return dict(n=draw(1, 20), m=parts * draw(1, 90), q=parts * r, r=r, scale=0.5, U=("T", "f32")[draw(0, 1)])


def _flops(call: Call) -> int:
    return 2 * call["n"] * call["m"] * call["r"]


_CASES = [
    dict(n=n, m=m, q=parts * r, r=r, scale=0.5, U=U)
    for n, m, r, parts, U in (
        (1, 8, 4, 1, "T"),
        (3, 33, 8, 3, "f32"),
        (20, 96, 16, 2, "T"),
        (9, 130, 5, 1, "f32"),
        (2, 20, 256, 1, "T"),
        (66, 200, 40, 3, "f32"),  # more rows than lora_add_few takes; parts that begin inside of tiles
        (130, 72, 72, 2, "T"),  # more than one tile of r
        (1100, 40, 16, 1, "T"),  # two pieces of the rows
        (5, 2200, 8, 2, "f32"),  # ... and of the columns of each part
    )
]

lora_add = Op(
    "lora_add",
    "y[n,m]:U = (a[n,m]:U, h[n,q]:T, b[m,r]:T, part[m]:i32, q:i32, scale:f32)",
    doc="y[i,j] = a[i,j] + scale sum_l h[i, part[j] r + l] b[j,l]",
    reference=_lora_add,
    kernels=_add_kernels,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
    kernel_docs={
        "lora_add_few": "y = a + scale * b h for few rows of h: lanes share a row of b.",
        "lora_add": "y = a + scale * b h for many rows of h, in tiles of y.",
    },
    shape=dict(n=1, m=6144, q=48, r=16, scale=2.0, U="T"),
    flops=_flops,
    gradient=_gradient,
    recompute="layers",
)

lora_backward_h = Op(
    "lora_backward_h",
    "dh[n,q]:T = (dy[n,m]:T, b[m,r]:T, part[m]:i32, q:i32, scale:f32)",
    doc="dh[i, p r + l] = scale sum of dy[i,j] b[j,l] over the j with part[j] = p",
    reference=_lora_backward_h,
    kernels=_backward_h_kernels,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
    kernel_docs={
        "lora_backward_h": "Pieces of the sums of dh, in tiles.",
        "lora_sum_h": "Adds up the pieces of dh.",
    },
    shape=dict(n=4096, m=6144, q=48, r=16, scale=2.0),
    flops=_flops,
)

lora_backward_b = Op(
    "lora_backward_b",
    "db[m,r]:f32 = (db[m,r]:f32, dy[n,m]:T, h[n,q]:T, part[m]:i32, scale:f32)",
    doc="db[j,l] += scale sum_i dy[i,j] h[i, part[j] r + l]",
    reference=_lora_backward_b,
    kernels=_backward_b_kernels,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
    kernel_docs={
        "lora_backward_b": "Pieces of the sums of db, in tiles.",
        "lora_sum_b": "Adds up the pieces of db.",
    },
    shape=dict(n=4096, m=6144, q=48, r=16, scale=2.0),
    flops=_flops,
)
