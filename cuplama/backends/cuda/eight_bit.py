"""Products of 8-bit floats over many rows: x is rounded to e4m3, with a scale for each row or for 128 columns of it,
and the codes of a packed weight are laid out row by row. Kernels: cuda_src/activations_fp8.cu, unpack.cu.

Where an op has something before its product (``Op.inner``), that writes the codes itself.
"""

from __future__ import annotations

from ...dtypes import dtype_name
from ...ops.launch import Launch
from ...ops.op import Call
from ...ops.unpacking import UNPACKED
from ...ops.weights import segments_of
from ...quant.format import BLOCK_COLUMNS, BLOCK_ROWS, E4M3

__all__ = ["FAST", "Scratch", "quantise_launch", "row_scratch", "scale_kind", "unpack_codes_launch", "weight_scratch"]

FAST = frozenset({"row"})
"""Kinds of scales whose products keep their sums in the tensor cores. With k = 4,096 to 14,336 that makes them wrong by
1.3e-3 to 2.9e-3 of their norm, where exact sums are by 1.3e-4; rounding x to e4m3 costs 2.6e-2. The products of an 8B
model take 21.9 ms for 2,048 rows in place of 23.7, on an H200. cuBLAS has no such products with other scales."""

Scratch = dict[str, tuple[tuple[int, ...], str]]
_KINDS = {0: "row", BLOCK_COLUMNS: "group"}  # columns that share a scale of the weight -> a kind of cublas.SCALES
_ALIGNED_K = 16
_WIDTH, _MAX_THREADS = 8, 512  # columns that a thread takes at once, threads of a block, which has a row
_MAX_CHUNKS = 7  # vectors of a thread that fit in its registers: rows of 28,672, the longest of a 70B Llama
_WARPS = 4  # of a thread block of unpack_codes


def scale_kind(call: Call) -> str | None:
    """The kind of scales (``cublas.SCALES``) with which a product of 8-bit floats is the call's; None if none is."""
    segments, k = segments_of(call.arrays["w"]), call["k"]
    if segments is None or len(segments) > 1 or segments[0].order is not None:
        return None
    packing = segments[0].format.packing
    if packing.code != E4M3 or [name for name, _ in packing.parts] != ["scale"]:
        return None
    fits = k % _ALIGNED_K == 0 and call.dtypes["T"].itemsize == 2 and _chunks(k) <= _MAX_CHUNKS
    return _KINDS.get(packing.group) if fits else None


def _inner(call: Call) -> str:
    """The kernel before the product; "" where there is none."""
    return "" if call.op.inner is None else call.op.inner(call).kernel.partition(":")[2]


def _chunks(k: int) -> int:
    return -(-k // (_WIDTH * _MAX_THREADS))


def quantise_launch(call: Call, kind: str) -> Launch:
    """The launch that writes ``x_codes`` and ``x_scale``."""
    chunks, inner = _chunks(call["k"]), _inner(call)
    threads = -(-call["k"] // (_WIDTH * chunks * 32)) * 32
    kernel = f"activations_fp8.cu:{f'{inner}_' if inner else ''}quantise"
    return Launch(kernel, (call["n"],), (threads,), constants={"CHUNKS": chunks, "GROUPS": kind == "group"})


def unpack_codes_launch(call: Call, start: int, stop: int) -> Launch:
    """The launch that writes rows ``start`` .. ``stop - 1`` of the weight to ``dense`` and ``w_scale``. start: a
    multiple of the rows of a block."""
    (segment,) = segments_of(call.arrays["w"]) or ()
    grid = (-(-call["k"] // (_WARPS * BLOCK_COLUMNS)), -(-(stop - start) // BLOCK_ROWS))
    constants = {"W": segment.format.packing.type, "rows": segment.rows, "first": start, "end": stop}
    return Launch("unpack.cu:unpack_codes", grid, (32 * _WARPS,), constants=constants, names={"w": "w.0"})


def row_scratch(call: Call, kind: str) -> Scratch:
    """The codes of x, four in a word, and their scales."""
    n, k = call["n"], call["k"]
    scales = (-(-k // BLOCK_COLUMNS), n) if kind == "group" else (n,)
    return {"x_codes": ((n, k // 4), "u32"), "x_scale": (scales, "f32")}


def weight_scratch(call: Call, rows: int, kind: str) -> Scratch:
    """The codes of that many rows of a weight, where its numbers would be otherwise, in half of the bytes; and their
    scales."""
    k = call["k"]
    scales = (-(-k // BLOCK_COLUMNS), rows) if kind == "group" else (rows,)
    return {UNPACKED: ((rows, k // 2), dtype_name(call.dtypes["T"])), "w_scale": (scales, "f32")}
