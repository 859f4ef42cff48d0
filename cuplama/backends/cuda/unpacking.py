"""The numbers of a packed weight, for products over many rows: those cuBLAS computes, from a plain matrix in scratch.

The matrix is written anew for every product (cuda_src/unpack.cu), in slices where the weight is large: a slice is
unpacked, then its columns of the product are computed. All products share the scratch: a captured pass that kept one of
its own would keep as much for a few rows as for many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...ops.launch import Launch
from ...ops.weights import SegmentLike
from ...quant.format import BLOCK_COLUMNS, BLOCK_ROWS

__all__ = ["SLICE_BYTES", "UNPACKED", "largest_slice", "row_slices", "unpack_launches"]

SLICE_BYTES = 256 << 20
"""Bytes of the unpacked numbers that a slice has at most."""
UNPACKED = "dense"
"""The name of the scratch that a slice is written to."""
_SLICE_ROWS = 256  # A slice has a multiple of these: whole tiles of a product.
_TABLES = ("embed_tokens", "position_table")  # canonical names
_WARPS = 8  # of a thread block of unpack.cu, each with a block of the weight


def row_slices(m: int, k: int, itemsize: int) -> list[tuple[int, int]]:
    """The rows of a weight [m, k] that are unpacked at a time, first and end: equal slices but for the last."""
    count = -(-m * k * itemsize // SLICE_BYTES)
    rows = max(1, -(-m // (count * _SLICE_ROWS))) * _SLICE_ROWS
    if rows * k * itemsize > SLICE_BYTES:
        rows = max(1, rows // _SLICE_ROWS - 1) * _SLICE_ROWS
    return [(start, min(start + rows, m)) for start in range(0, m, rows)]


def largest_slice(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
    """Bytes of scratch for products with packed weights of these names and shapes, one at a time.

    Tables that rows are looked up in are not multiplied with.
    """
    found = 0
    for m, k in (shape for name, shape in shapes.items() if name not in _TABLES):
        start, stop = row_slices(m, k, itemsize)[0]
        found = max(found, (stop - start) * k * itemsize)
    return found


def unpack_launches(segments: Sequence[SegmentLike], k: int, start: int, stop: int) -> Iterator[Launch]:
    """The launches that write rows ``start`` .. ``stop - 1`` of the packed weight ``w`` to the scratch ``dense``."""
    column = 0
    for i, segment in enumerate(segments):
        first, end = max(start, column) - column, min(stop, column + segment.rows) - column
        if first < end:
            skipped = first % BLOCK_ROWS
            grid = (-(-k // (_WARPS * BLOCK_COLUMNS)), -(-(end - first + skipped) // BLOCK_ROWS))
            constants = {
                "W": segment.format.packing.type, "rows": segment.rows, "first": first, "end": end,
                "to": first + column - start,
            }  # fmt: skip
            names = {"w": f"w.{i}", "order": f"w.{i}.order"}
            yield Launch("unpack.cu:unpack", grid, (32 * _WARPS,), constants=constants, names=names)
        column += segment.rows
