"""The residual stream: its sum, a multiple of it, parts of it, and what it is in the model's dtype.

Kernels: cuda_src/residual.cu.
"""

from __future__ import annotations

from ..dtypes import Array, upcast
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .op import EXACT, Call, Op

__all__ = ["add", "cast", "cast_backward", "cast_launch", "place_rows", "scale", "select_rows", "slice_rows"]


def _add(a: Array, b: Array) -> Array:
    return a + b


def _scale(x: Array, *, factor: float) -> Array:
    return x * factor


def _select_rows(x: Array, rows: Array) -> Array:
    return x[rows]


def _cast(x: Array, *, U: str = "") -> Array:
    return x


def _cast_backward(dy: Array, a: Array | None = None) -> Array:
    dx = upcast(dy)
    return dx if a is None else dx + a


def _slice_rows(x: Array, *, first: int, r: int) -> Array:
    return x[first : first + r]


def _place_rows(y: Array, x: Array, *, first: int) -> Array:
    y[first : first + len(x)] = x
    return y


def _add_gradient(g: Gradient) -> None:
    g.give("a", g.of("y"))
    g.give("b", g.of("y"))


def _scale_gradient(g: Gradient) -> None:
    g.give("x", g.emit("scale", g.of("y"), factor=g.attr("factor")))


def _cast_gradient(g: Gradient) -> None:
    g.give("x", g.emit("cast_backward", g.of("y"), g.so_far("x")))


def _slice_gradient(g: Gradient) -> None:
    """All slices together make the gradient of the whole."""
    whole = g.into("x")
    g.update("place_rows", (whole,), (whole, g.of("y")), first=g.attr("first"))
    g.give("x", whole)


def _cupy_add(y: Array, a: Array, b: Array) -> None:
    import cupy

    cupy.add(a, b, out=y)


def _cupy_select_rows(y: Array, x: Array, rows: Array) -> None:
    import cupy

    cupy.take(x, rows, axis=0, out=y)


_THREADS = 128  # small blocks: the row of a single token spreads over several multiprocessors


def _f32_kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch(f"residual.cu:{call.op.name}", (-(-call["n"] * call["d"] // (4 * _THREADS)),), (_THREADS,)),))


def _select_kernels(call: Call, device: Device) -> Plan:
    width = 16 // call.dtypes["U"].itemsize
    return Plan((Launch("residual.cu:select_rows", (call["r"], -(-call["d"] // (width * _THREADS))), (_THREADS,)),))


def cast_launch(kernel: str, n: int, d: int) -> Launch:
    """The launch of a cast, or of its gradient, of [n, d] elements."""
    return Launch(f"residual.cu:{kernel}", (-(-n * d // (8 * _THREADS)),), (_THREADS,))


def _cast_kernels(call: Call, device: Device) -> Plan:
    return Plan((cast_launch(call.op.name, call["n"], call["d"]),))


def _copy_kernels(call: Call, device: Device) -> Plan:
    width = 16 // call.dtypes["T"].itemsize
    return Plan(
        (Launch(f"residual.cu:{call.op.name}", (-(-call["r"] * call["d"] // (width * _THREADS)),), (_THREADS,)),)
    )


def _copied_bytes(call: Call) -> float:
    return float(2 * call["r"] * call["d"] * call.dtypes["T"].itemsize)


add = Op(
    "add",
    "y[n,d]:f32 = (a[n,d]:f32, b[n,d]:f32)",
    doc="y = a + b",
    reference=_add,
    gradient=_add_gradient,
    kernels=_f32_kernels,
    cases=[dict(n=n, d=d) for n, d in ((1, 64), (3, 7), (2, 896), (5, 4096))],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000)),
    flops=lambda c: c["n"] * c["d"],
    library=_cupy_add,
)

scale = Op(
    "scale",
    "y[n,d]:f32 = (x[n,d]:f32, factor:f32)",
    doc="y = factor x: embeddings and logits of models that multiply them by a number",
    reference=_scale,
    gradient=_scale_gradient,
    recompute="cheap",
    kernels=_f32_kernels,
    cases=[dict(n=n, d=d, factor=k) for n, d, k in ((1, 64, 0.5), (3, 7, -1.25), (2, 896, 0.0625), (5, 4096, 59.8665))],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000), factor=0.125 * draw(1, 99)),
    tolerance={"f32": 1.0},
    shape={"n": 1, "d": 2304, "factor": 48.0},
    flops=lambda c: c["n"] * c["d"],
)

select_rows = Op(
    "select_rows",
    "y[r,d]:U = (x[n,d]:U, rows[r]:i32)",
    doc="y = x[rows]: the tokens whose logits are asked for",
    reference=_select_rows,
    kernels=_select_kernels,
    cases=[dict(n=n, r=r, d=d, U=U) for U in ("f32", "T") for n, r, d in ((1, 1, 64), (9, 3, 7), (6, 6, 896))],
    sizes=lambda draw: dict(n=draw(1, 9), r=draw(1, 9), d=draw(1, 3000), U="f32" if draw(0, 1) else "T"),
    ranges={"rows": "n"},
    tolerance=EXACT,
    library=_cupy_select_rows,
    bytes=lambda c: c["r"] * (4 + 2 * c["d"] * c.dtypes["U"].itemsize),
)

cast = Op(
    "cast",
    "y[n,d]:U = (x[n,d]:f32)",
    doc="y = x rounded to another dtype",
    reference=_cast,
    gradient=_cast_gradient,
    recompute="cheap",
    kernels=_cast_kernels,
    cases=[dict(n=n, d=d, U="T") for n, d in ((1, 64), (3, 7), (5, 900))],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000), U="T"),
    tolerance={"f32": 0.0},
)

cast_backward = Op(
    "cast_backward",
    "dx[n,d]:f32 = (dy[n,d]:T, a[n,d]:f32?)",
    doc="The gradient of cast: dx = dy, plus a where it is given.",
    reference=_cast_backward,
    kernels=_cast_kernels,
    cases=[dict(n=n, d=d, a=a) for n, d, a in ((1, 64, False), (3, 7, True), (5, 900, True), (2, 33, False))],
    sizes=lambda draw: dict(n=draw(1, 5), d=draw(1, 3000), a=bool(draw(0, 1))),
    tolerance={"f32": 1.0},
    flops=lambda c: c["n"] * c["d"],
)

slice_rows = Op(
    "slice_rows",
    "y[r,d]:T = (x[n,d]:T, first:i32, r:i32)",
    doc="y = x[first : first + r]",
    reference=_slice_rows,
    kernels=_copy_kernels,
    cases=[dict(n=n, r=r, first=first, d=d) for n, r, first, d in ((1, 1, 0, 64), (9, 3, 5, 7), (6, 6, 0, 896))],
    gradient=_slice_gradient,
    sizes=lambda draw: dict(n=9, r=draw(1, 5), first=draw(0, 4), d=draw(1, 3000)),
    rules=("first + r <= n",),
    tolerance=EXACT,
    bytes=_copied_bytes,
)

place_rows = Op(
    "place_rows",
    "y[n,d]:T = (y[n,d]:T, x[r,d]:T, first:i32)",
    doc="y[first : first + r] = x",
    reference=_place_rows,
    kernels=_copy_kernels,
    cases=[dict(n=n, r=r, first=first, d=d) for n, r, first, d in ((1, 1, 0, 64), (9, 3, 5, 7), (6, 6, 0, 896))],
    sizes=lambda draw: dict(n=9, r=draw(1, 5), first=draw(0, 4), d=draw(1, 3000)),
    rules=("first + r <= n",),
    tolerance=EXACT,
    bytes=_copied_bytes,
)
