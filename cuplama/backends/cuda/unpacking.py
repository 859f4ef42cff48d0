"""The numbers of a packed weight, for products over many rows: those cuBLAS computes, from a plain matrix in scratch.

The matrix is written anew for every product (cuda_src/unpack.cu), in slices where the weight is large: a slice is
unpacked, then its columns of the product are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ops.launch import Launch
from ...ops.weights import SegmentLike
from ...quant.format import BLOCK_COLUMNS, BLOCK_ROWS

__all__ = ["SLICE_BYTES", "row_slices", "slice_bytes", "unpack_launches"]

SLICE_BYTES = 256 << 20
"""Bytes of the unpacked numbers that a slice has at most."""
_SLICE_ROWS = 256  # A slice has a multiple of these: whole tiles of a product.
_WARPS = 8  # of a thread block of unpack.cu, each with a block of the weight


def row_slices(m: int, k: int, itemsize: int) -> list[tuple[int, int]]:
    """The rows of a weight [m, k] that are unpacked at a time, first and end: equal slices but for the last."""
    count = -(-m * k * itemsize // SLICE_BYTES)
    rows = max(1, -(-m // (count * _SLICE_ROWS))) * _SLICE_ROWS
    if rows * k * itemsize > SLICE_BYTES:
        rows = max(1, rows // _SLICE_ROWS - 1) * _SLICE_ROWS
    return [(start, min(start + rows, m)) for start in range(0, m, rows)]


def slice_bytes(m: int, k: int, itemsize: int) -> int:
    """Bytes of the scratch that products with packed weights [m, k] share and keep: those of the largest slice.

    Codes of 8 bits and their scales take less than numbers of 16.
    """
    start, stop = row_slices(m, k, itemsize)[0]
    return (stop - start) * k * itemsize


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
