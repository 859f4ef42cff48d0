"""Low-rank adapters of a product. Kernels: cuda_src/lora.cu, lora_mma.cu. Hu et al., "LoRA", arXiv:2106.09685.

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
_THREADS, _TILE, _SIDE = 256, 64, 16  # lora.cu: of a block, rows of its tile, threads side by side in it
_MMA_TILE = 128  # lora_mma.cu: rows of dh, or of db, of a block
_MMA_WIDTHS = (16, 32, 64, 128)  # ... and elements of r that it has
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
    n, m, r = (call[name] for name in "nmr")
    if n <= _FEW and r <= _FEW_RANK and not device.deterministic:
        lanes, rows = _power(-(-r // 8)), _power(min(n, 8))
        grid = (-(-m * lanes // _FEW_THREADS), -(-n // rows))
        return Plan((Launch("lora.cu:lora_add_few", grid, (_FEW_THREADS,), constants={"LANES": lanes, "ROWS": rows}),))
    grid = (-(-m // 64), -(-n // 64))
    if _on_tensor_cores(call, device):
        return Plan((Launch("lora_mma.cu:lora_add_mma", grid, (_THREADS,)),))
    return Plan((Launch("lora.cu:lora_add", grid, (_THREADS,)),))


def _power(x: int) -> int:
    """The least power of two that is not less."""
    return 1 << (x - 1).bit_length()


def _on_tensor_cores(call: Call, device: Device) -> bool:
    return call.dtypes["T"].itemsize == 2 and device.arch >= 80


def _backward_h_kernels(call: Call, device: Device) -> Plan:
    n, m, q, r = (call[name] for name in "nmqr")
    return _in_pieces(call, device, rows=n, parts=q // r, shape=(n, q), length=m * r // q)


def _backward_b_kernels(call: Call, device: Device) -> Plan:
    n, m, r = (call[name] for name in "nmr")
    return _in_pieces(call, device, rows=m, parts=1, shape=(m, r), length=n)


def _in_pieces(call: Call, device: Device, rows: int, parts: int, shape: tuple[int, int], length: int) -> Plan:
    """A product with few tiles and long sums, and the sum of its pieces. rows: of tiles; length: of a sum."""
    r, kernel = call["r"], call.op.name
    if _on_tensor_cores(call, device):
        tile, width = _MMA_TILE, next((w for w in _MMA_WIDTHS if r <= w), _MMA_WIDTHS[-1])
        kernel, constants = f"lora_mma.cu:{kernel}_mma", {"NEW": width // 8}
    else:
        tile, width = _TILE, _SIDE * min(4, _power(-(-r // _SIDE)))
        kernel, constants = f"lora.cu:{kernel}", {"C": width // _SIDE}
    grid = (-(-rows // tile), -(-r // width) * parts)
    pieces = max(1, min(_BLOCKS // math.prod(grid), length // _PIECE))
    adding = f"lora.cu:lora_sum_{call.op.name[-1]}"
    blocks = -(-math.prod(shape) // (4 * _THREADS))
    launches = (
        Launch(kernel, (*grid, pieces), (_THREADS,), constants=constants),
        Launch(adding, (blocks,), (_THREADS,), constants={"pieces": pieces}),
    )
    return Plan(launches, {"partial": ((pieces, *shape), "f32")})


def _sizes(draw: Draw) -> dict[str, Any]:
    r, parts = draw(1, 40), draw(1, 3)
    return dict(n=draw(1, 20), m=parts * draw(1, 90), q=parts * r, r=r, scale=0.5, U=("T", "f32")[draw(0, 1)])


_CASES = [
    dict(n=n, m=m, q=parts * r, r=r, scale=0.5, U=U)
    for n, m, r, parts, U in (
        (1, 8, 4, 1, "T"),
        (3, 33, 8, 3, "f32"),
        (20, 96, 16, 2, "T"),
        (9, 130, 5, 1, "f32"),
        (2, 20, 256, 1, "T"),
        (66, 107, 21, 3, "f32"),  # more rows than lora_add_few takes; parts that begin inside of tiles
        (70, 72, 72, 2, "T"),
        (1030, 16, 8, 1, "T"),  # two pieces of the rows
        (3, 2050, 8, 2, "f32"),  # ... and of the columns of each part
    )
]

lora_add = Op(
    "lora_add",
    "y[n,m]:U = (a[n,m]:U, h[n,q]:T, b[m,r]:T, part[m]:i32, q:i32, scale:f32)",
    doc="y[i,j] = a[i,j] + scale sum_l h[i, part[j] r + l] b[j,l]. part does not decrease.",
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
        "lora_add_mma": "y = a + scale * b h for many rows of h, in tiles of y, on tensor cores.",
    },
    shape=dict(n=1, m=6144, q=48, r=16, scale=2.0, U="T"),
    flops=lambda c: 2 * c["n"] * c["m"] * c["r"],
    gradient=_gradient,
    recompute="layers",
)

lora_backward_h = Op(
    "lora_backward_h",
    "dh[n,q]:T = (dy[n,m]:T, b[m,r]:T, part[m]:i32, q:i32, scale:f32)",
    doc="dh[i, p r + l] = scale sum of dy[i,j] b[j,l] over the j with part[j] = p. part does not decrease.",
    reference=_lora_backward_h,
    kernels=_backward_h_kernels,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
    kernel_docs={
        "lora_backward_h": "Pieces of the sums of dh, in tiles.",
        "lora_backward_h_mma": "Pieces of the sums of dh, in tiles, on tensor cores.",
        "lora_sum_h": "Adds up the pieces of dh.",
    },
    shape=dict(n=4096, m=6144, q=48, r=16, scale=2.0),
    flops=lambda c: 2 * c["n"] * c["m"] * c["r"],
)

lora_backward_b = Op(
    "lora_backward_b",
    "db[m,r]:f32 = (db[m,r]:f32, dy[n,m]:T, h[n,q]:T, part[m]:i32, scale:f32)",
    doc="db[j,l] += scale sum_i dy[i,j] h[i, part[j] r + l]. part does not decrease.",
    reference=_lora_backward_b,
    kernels=_backward_b_kernels,
    cases=_CASES,
    sizes=_sizes,
    inputs=_inputs,
    ranges={"part": "q//r"},
    tolerance=PRODUCT_TOLERANCE,
    kernel_docs={
        "lora_backward_b": "Pieces of the sums of db, in tiles.",
        "lora_backward_b_mma": "Pieces of the sums of db, in tiles, on tensor cores.",
        "lora_sum_b": "Adds up the pieces of db.",
    },
    shape=dict(n=4096, m=6144, q=48, r=16, scale=2.0),
    flops=lambda c: 2 * c["n"] * c["m"] * c["r"],
)
