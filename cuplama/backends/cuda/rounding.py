"""Plain weights that are quantised on the GPU while they are loaded: their bytes go there as they lie in the file.

The kernels of cuda_src/quantise.cu write the blocks that products read; what they compute is what
``quant/rtn.py`` does in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...dtypes import Array, dtype_name
from ...quant.format import BLOCK_COLUMNS, BLOCK_ROWS, E4M3
from ...quant.grid import GRIDS
from ...quant.rtn import GROUPS, Rounded
from .gpu import Gpu

__all__ = ["RoundingJob", "rounding_kernels"]

_FILE = "quantise.cu"
_WARPS = 8  # of a thread block: each takes a row of a block, or a block
_SHARES = 4  # that the kernel takes at most


def rounding_kernels() -> Iterator[tuple[str, str]]:
    """(file, C++ name) of every kernel instance that may quantise a weight."""
    found: dict[str, None] = {}
    for grid in GRIDS.values():
        for group in GROUPS if grid.group else (0,):
            for dtype in ("f32", "f16", "bf16"):
                found |= dict.fromkeys(_names(dtype, grid.code.bits, group, grid.code is E4M3))
    yield from ((_FILE, name) for name in found)


def _names(dtype: str, bits: int, group: int, floats: bool) -> tuple[str, str]:
    return (
        f"quantise_scales<{dtype}, {group}>",
        f"quantise_codes<{dtype}, {bits}, {group}, {str(floats).lower()}>",
    )


@dataclass(frozen=True)
class _Pieces:
    """What goes to the GPU in one buffer. pieces: (offset, bytes); size: of it all, in bytes."""

    pieces: list[tuple[int, np.ndarray[Any, Any]]]
    size: int


class RoundingJob:
    """The quantising of plain parts, one below the other: [m, k] in all.

    layout: what the buffer of raw bytes holds; nbytes: of the blocks that are written.
    """

    def __init__(self, stack: Sequence[Rounded]) -> None:
        first = stack[0]
        assert first.format.packing is not None
        self.packing, self.m, self.k = first.format.packing, sum(len(s) for s in stack), first.shape[1]
        self.nbytes = self.packing.nbytes(self.m, self.k)
        self._grid, self._group, self._dtype = first.grid, first.group, first.plain.dtype
        pieces, at = [], 0
        for part in stack:
            pieces.append((at, np.ascontiguousarray(part.plain).reshape(-1).view(np.uint8)))
            at += pieces[-1][1].size
        self.layout = _Pieces(pieces, at)

    def queue(self, gpu: Gpu, raw: Array, blocks: Array) -> None:
        """Launch the kernels. raw: holds what ``layout`` says; blocks: uint8 [nbytes], all of which they write."""
        grid, packing = self._grid, self.packing
        tall, wide = -(-self.m // BLOCK_ROWS), -(-self.k // BLOCK_COLUMNS)
        names = _names(dtype_name(self._dtype), grid.code.bits, self._group, grid.code is E4M3)
        scales, codes = (gpu.function(_FILE, name, 0) for name in names)
        place = blocks[packing.offset("scale") if self._group else tall * wide * packing.block_bytes :]
        w = raw[: self.layout.size].view(np.dtype(f"u{self._dtype.itemsize}"))
        m, k, stride = np.int32(self.m), np.int32(self.k), np.int32(packing.block_bytes)
        ends = np.float32(grid.least), np.float32(grid.most)
        assert len(grid.shares) <= _SHARES
        assert self._group or len(grid.shares) == 1  # of whole rows no scale but the first is tried
        shares = [np.float32(share) for share in (*grid.shares, *[0.0] * _SHARES)][:_SHARES]
        rows = -(-tall * BLOCK_ROWS // _WARPS)
        far = np.float32(grid.far), np.int32(grid.signed)
        arguments = (place, w, m, k, stride, np.int32(wide), *ends, *far, *shares)
        scales((rows, wide if self._group else 1, 1), (32 * _WARPS, 1, 1), arguments, 0)
        arguments = (blocks, place, w, m, k, stride, *ends)
        codes((-(-tall // _WARPS), wide, 1), (32 * _WARPS, 1, 1), arguments, 0)
