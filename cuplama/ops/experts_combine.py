"""What the experts of a row give, weighted and added up, in one launch for few rows. Kernel:
cuda_src/experts_combine_mma.cu, on tensor cores.

Defined by its parts, ``expert_linear`` and ``combine_pairs``: the reference only calls theirs. What the kernel does not
take is computed by their launches, which hand over the products of the pairs, rounded to T: so are packed weights, for
which a kernel of this kind was slower. For gpt-oss-20b it took 14.7 us on an H200 where the two launches take 13.6, and
62.7 instead of 47.8 for eight rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..dtypes import Array, dtype_name
from . import experts_packed
from .experts import expert_linear, experts_with_pairs, packed_ways, pair_inputs
from .launch import Device, Launch, Plan
from .linear import PRODUCT_TOLERANCE
from .linear_packed import ROWS
from .op import Call, Draw, Op
from .route import MAX_EXPERTS, combine_pairs
from .weights import segments_of, stored_bytes

__all__ = ["expert_linear_combine"]

_WARP = 32
_MAX_ROWS = 4  # of Qwen3-30B-A3B one takes 12.6 us on an H200, in two launches 16.7; with eight these are faster
_MAX_PAIRS = 128  # as in experts_combine_mma.cu
_RESERVED_BYTES = 7 << 10  # of shared memory: the kernel's static arrays, and what the driver keeps for itself
_PAIRS = "products"  # scratch: the products of the pairs, where two launches compute the op
_TILE_ROWS = 16  # of w: the M of the instruction mma.m16n8k16
_CHUNK = 64  # elements of a row of w that a warp multiplies at a time
_MIN_COLUMNS = 4  # of y for a GPU block: for fewer its start costs more than it saves
_WARPS = (16, 8, 4)  # of a GPU block: as many as leave each a ring
_MIN_DEPTH, _MAX_DEPTH = 2, 8  # chunks in a warp's ring
# Of weights, and of x beside them, that a GPU block has asked for ahead of what it multiplies, at most: one row of
# Qwen3-30B-A3B has 190 KB for each multiprocessor of an H200.
_MAX_RING_BYTES = 208 << 10


def _reference(
    x: Array, w: Array, pairs: Array, offsets: Array, weights: Array, b: Array | None = None, a: Array | None = None
) -> Array:
    y: Array = combine_pairs.reference(expert_linear.reference(x, w, pairs, offsets, b), weights, a)
    return y


def _rows(call: Call) -> int:
    """Rows of x that a kernel is compiled for."""
    return next(rows for rows in ROWS if rows >= call["n"])


def _table_bytes(call: Call) -> tuple[int, int]:
    """Experts that may be chosen, and the bytes of shared memory in which a kernel keeps by whom."""
    most = min(call["E"], call["n"] * call["s"])
    return most, 4 * most * (1 + 2 * _rows(call))


def _fused(call: Call, device: Device) -> Launch | None:
    """The launch that computes all of it; None where the kernel does not take it, or shared memory is too small."""
    n, m, k, pairs = call["n"], call["m"], call["k"], call["n"] * call["s"]
    if n > _MAX_ROWS or pairs > _MAX_PAIRS or call["E"] > MAX_EXPERTS or device.deterministic:
        return None  # on a deterministic device a row's sums are those of any number of rows
    if call.dtypes["T"].itemsize != 2 or device.arch < 80 or k % 8 or segments_of(call.arrays["w"]) is not None:
        return None
    rows, (most, table) = _rows(call), _table_bytes(call)
    blocks = min(device.sms, -(-m // _MIN_COLUMNS))
    tiles = -(-m // (blocks * _TILE_ROWS))  # of the columns of a GPU block
    chunks = most * -(-k // _CHUNK)
    place = (_TILE_ROWS + rows) * _CHUNK * 2  # bytes of a chunk
    for warps in _WARPS:
        beside = table + warps * tiles * _TILE_ROWS * rows * 4
        room = min(_MAX_RING_BYTES, device.shared - _RESERVED_BYTES - beside) // (warps * place)
        if room < _MIN_DEPTH:
            continue
        depth = max(_MIN_DEPTH, min(_MAX_DEPTH, -(-chunks // warps) * tiles, room))
        # Two do not fit a multiprocessor, so those of the next kernel are dealt out evenly.
        shared = max(depth * warps * place + beside, device.shared // 2)
        own = {"N": rows, "WARPS": warps, "DEPTH": depth, "most": most}
        return Launch("experts_combine_mma.cu:expert_linear_combine_mma", (blocks,), (_WARP * warps,), shared, own)
    return None


def _parts(call: Call, device: Device) -> Plan:
    """The launches of both parts, one behind the other."""
    assert combine_pairs.kernels is not None
    n, m, pairs, T = call["n"], call["m"], call["n"] * call["s"], dtype_name(call.dtypes["T"])
    # To the product, of which each pair has a row of x, these are rows with one expert each; but of the pairs of an
    # expert there are no more than the op has rows, so few rows have tiles of few pairs.
    ways = replace(experts_packed.WAYS, streamed_rows=2 * n - 1) if n <= _MAX_ROWS else experts_packed.WAYS
    op = packed_ways(expert_linear, ways)
    assert op.kernels is not None
    product = op.kernels(replace(call, op=op, env={**call.env, "n": pairs, "s": 1}), device)
    (last,) = combine_pairs.kernels(replace(call, op=combine_pairs, env={"n": n, "d": m}), device).launches
    last = replace(last, constants={"d": m, "U": T}, names={"x": _PAIRS})
    products = (replace(launch, names={**launch.names, "y": _PAIRS}) for launch in product.launches)
    return replace(product, launches=(*products, last), scratch={**product.scratch, _PAIRS: ((pairs, m), T)})


def _plan(call: Call, device: Device) -> Plan:
    launch = _fused(call, device)
    return _parts(call, device) if launch is None else Plan((launch,))


def _bytes(call: Call) -> float:
    """Weights of the experts that were chosen, and every other array once."""
    n, m, pairs, chosen = call["n"], call["m"], call["n"] * call["s"], experts_with_pairs(call)
    w, itemsize = call.arrays["w"], call.dtypes["T"].itemsize
    expert = stored_bytes(w) / call["E"] if segments_of(w) else m * call["k"] * itemsize
    bias, residual = (call.arrays[name] is not None for name in ("b", "a"))
    floats = chosen * m * bias + pairs * call["k"]
    return float(chosen * expert + floats * itemsize + 4 * (n * m * (1 + residual) + 2 * pairs + call["E"] + 1))


def _sizes(draw: Draw) -> dict[str, Any]:
    E = draw(1, 20)
    return dict(n=draw(1, 9), s=(s := draw(1, min(E, 5))), E=E, m=draw(1, 70), k=draw(1, 20) * draw(1, 40),
                b=bool(draw(0, 1)), a=bool(draw(0, 1)), chosen=draw(s, E))  # fmt: skip


expert_linear_combine = Op(
    "expert_linear_combine",
    "y[n,m]:f32 = (x[n*s,k]:T, w[E,m,k]:W, pairs[n*s]:i32, offsets[E+1]:i32, weights[n,s]:f32, b[E,m]:T?, a[n,m]:f32?)",
    doc="y[i] = a[i] + sum over s of weights[i,s] * (x[i * s + slot] w[expert]^T + b[expert]); a may be left out. The"
    " pairs, row * s + slot, are sorted by expert as by sort_pairs; a row has an expert once.",
    reference=_reference,
    kernels=_plan,
    cases=[
        # One row; rows that share experts or all of them; odd sizes; more rows than a kernel takes.
        dict(n=1, s=1, E=1, m=8, k=8, b=False, a=False),
        dict(n=1, s=8, E=37, m=40, k=200, b=False, a=True),
        dict(n=2, s=3, E=9, m=33, k=72, b=True, a=True),
        dict(n=3, s=2, E=7, m=150, k=136, b=True, a=True, chosen=2),
        dict(n=4, s=4, E=60, m=72, k=64, b=False, a=True),
        dict(n=4, s=1, E=3, m=25, k=328, b=True, a=False, chosen=1),
        dict(n=9, s=2, E=5, m=24, k=72, b=True, a=True),
        dict(n=3, s=2, E=4, m=10, k=61, b=True, a=True),
        # Packed, in two launches: one row, and several.
        dict(n=1, s=4, E=6, m=40, k=328, b=True, a=True, W="mxfp4"),
        dict(n=5, s=2, E=7, m=48, k=200, b=False, a=True, W="int4 g128", chosen=3),
        dict(n=9, s=2, E=3, m=23, k=200, b=True, a=True, W="Q4_K"),
    ],
    sizes=_sizes,
    inputs=pair_inputs,
    shape=dict(n=1, s=8, E=128, m=2048, k=768, b=False, a=True),
    # Where two launches compute it, the products of the pairs are rounded to T, of which y, in f32, is a sum.
    tolerance={**PRODUCT_TOLERANCE, "f16:f32": 5000.0, "bf16:f32": 40000.0},
    bytes=_bytes,
    kernel_docs={
        **expert_linear.kernel_docs,
        "expert_linear_combine_mma": "The weighted sum of what the experts of up to 4 rows give, on tensor cores.",
        "combine_pairs": combine_pairs.doc,
    },
    flops=lambda c: 2 * c["n"] * c["s"] * c["m"] * (c["k"] + 1),
    unaligned=False,
)
