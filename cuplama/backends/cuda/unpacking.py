"""The numbers of a packed weight, for products over many rows: those cuBLAS computes, from a plain matrix in scratch.

The matrix is written anew for every product (cuda_src/unpack.cu), in slices where the weight is large: a slice is
unpacked, then its columns of the product are computed. (A product that sums over the rows of the weight, as in a
backward pass, has it unpacked as a whole: its slices would give sums to be added up, in more precision than the result
has.) All products share the scratch: a captured pass that kept one of its own would keep as much for a few rows as for
many.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...ops.experts_packed import unpacked_experts

__all__ = ["SLICE_BYTES", "largest_slice", "row_slices"]

SLICE_BYTES = 256 << 20
"""Bytes of the unpacked numbers that a slice has at most."""
_SLICE_ROWS = 256  # A slice has a multiple of these: whole tiles of a product.
_TABLES = ("embed_tokens", "position_table")  # canonical names


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
    for *experts, m, k in (shape for name, shape in shapes.items() if name not in _TABLES):
        start, stop = row_slices(m, k, itemsize)[0]
        rows = unpacked_experts(experts[0], m, k, itemsize) * m if experts else stop - start
        found = max(found, rows * k * itemsize)
    return found
