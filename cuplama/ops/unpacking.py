"""The numbers of a packed weight as a plain matrix, for products that take it so. Kernel: cuda_src/unpack.cu."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .launch import Launch
from .weights import SegmentLike

__all__ = ["UNPACKED", "unpack_launches"]

UNPACKED = "dense"
"""The name of the scratch that the numbers are written to."""
_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 128  # of a packed weight
_WARPS = 8  # of a thread block, each with a block of the weight


def unpack_launches(segments: Sequence[SegmentLike], k: int, start: int, stop: int) -> Iterator[Launch]:
    """The launches that write rows ``start`` .. ``stop - 1`` of the packed weight ``w`` to the scratch ``dense``."""
    column = 0
    for i, segment in enumerate(segments):
        first, end = max(start, column) - column, min(stop, column + segment.rows) - column
        if first < end:
            skipped = first % _BLOCK_ROWS
            grid = (-(-k // (_WARPS * _BLOCK_COLUMNS)), -(-(end - first + skipped) // _BLOCK_ROWS))
            constants = {
                "W": segment.format.packing.type, "rows": segment.rows, "first": first, "end": end,
                "to": first + column - start,
            }  # fmt: skip
            names = {"w": f"w.{i}", "order": f"w.{i}.order"}
            yield Launch("unpack.cu:unpack", grid, (32 * _WARPS,), constants=constants, names=names)
        column += segment.rows
