"""Products of many pairs of rows and experts, in tiles of pairs on tensor cores. Kernels: cuda_src/experts_many_mma.cu
and, on Hopper, cuda_src/experts_many_wgmma.cu, each for plain weights and for packed ones, whose codes become numbers
inside the tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from .launch import Device, Launch
from .op import Call
from .weights import SegmentLike

__all__ = ["MOST_PAIRS", "many_launch", "takes_many", "tile_columns"]

MOST_PAIRS = 256
"""Pairs of a tile, at most."""

_WARP = 32
_BAND, _TILE_ROWS, _STEP = 8, 16, 64  # tiles of w of a block, their rows; columns that are multiplied at a time
_STEP_BYTES, _SUMS_BYTES = 2 * _STEP, 4 * (_BAND * _TILE_ROWS + 4)  # of a pair: of x in a stage, of its sums at the end
_ALIGNMENT = 1024  # bytes: of operands of wgmma in shared memory
_RESERVED_BYTES = 8192  # of shared memory: static arrays, and what the driver keeps for itself
_MOST_BITS = 8  # of a code: those of 16 and 32 bits lie otherwise


@dataclass(frozen=True)
class _Tiles:
    """Tiles of pairs. rows: pairs of a tile at most; up_to: pairs of an expert, on the average, up to which they are
    taken; blocks: of the grid for which a multiprocessor is to have shared memory."""

    rows: int
    up_to: float
    blocks: int


@dataclass(frozen=True)
class _Kernel:
    """Kernels of one file. name: with a place for what tells the kernel of packed weights; depths: stages of x, the
    most first; behind: of them, those that are not asked for ahead; tiles: the first whose ``up_to`` is not
    exceeded is taken."""

    name: str
    warps: int
    depths: tuple[int, ...]
    behind: int
    alignment: int
    tiles: tuple[_Tiles, ...]


_MMA = _Kernel(
    "experts_many_mma.cu:expert_linear{}_many_mma", 4, (4, 3, 2), 1, 0,
    (_Tiles(64, 48, 2), _Tiles(128, inf, 2)),
)  # fmt: skip
_WGMMA = _Kernel(
    "experts_many_wgmma.cu:expert_linear{}_many_wgmma", 8, (6, 5, 4, 3), 2, _ALIGNMENT,
    (_Tiles(64, 48, 2), _Tiles(256, inf, 1)),
)  # fmt: skip
# Of 128 pairs tiles were no faster: 128 pairs of an expert of Qwen3-30B-A3B took an H200 329 us in tiles of 256 and 379
# in such of 128, and up to 32 pairs all take the same.


def takes_many(call: Call, device: Device, segment: SegmentLike | None = None) -> bool:
    """Whether the kernels take a product. segment: of a packed weight."""
    return (
        call.dtypes["T"].itemsize == 2
        and device.arch >= 80
        and call["k"] % 8 == 0
        and (segment is None or segment.format.packing.code.bits <= _MOST_BITS)
    )


def many_launch(
    constants: Mapping[str, Any],
    parts: int,
    call: Call,
    device: Device,
    E: int,
    segment: SegmentLike | None = None,
    most: int = MOST_PAIRS,
) -> Launch | None:
    """The launch for a product that the kernels take; None where a tile does not fit a block's shared memory.

    constants: the kernel's own; parts: rows of w that make a column of y; E: experts of the launch; segment: of a
    packed weight; most: pairs of a tile, at most.
    """
    of = _WGMMA if device.arch == 90 else _MMA
    pairs, chosen = call["n"] * call["s"], min(call["E"], call["n"] * call["s"])
    tiles = next(t for t in of.tiles if pairs <= t.up_to * chosen or t.rows >= most)
    shared = {
        d: max(d * tiles.rows * _STEP_BYTES + _ring_bytes(d - of.behind, segment), tiles.rows * _SUMS_BYTES)
        + of.alignment
        for d in of.depths
        if segment is None or d - of.behind >= _packed_slots(d - of.behind)
    }
    room = (device.shared // tiles.blocks - _RESERVED_BYTES, device.shared - _RESERVED_BYTES)
    depth = next((d for most in room for d, size in shared.items() if size <= most), None)
    if depth is None:
        return None
    own: dict[str, Any] = {**constants, "E": E, "ROWS": tiles.rows, "DEPTH": depth}
    if segment:
        own["W"] = segment.format.packing.type
    grid = ((pairs // tiles.rows + min(E, pairs)) * tile_columns(call["m"], parts),)
    names = {"w": "w.0"} if segment else {}
    kernel = of.name.format("_packed" if segment else "")
    return Launch(kernel, grid, (_WARP * of.warps,), shared[depth], own, names)


def tile_columns(m: int, parts: int) -> int:
    """Blocks of the grid that the columns of y of a tile of pairs take. parts: rows of w that make a column."""
    return -(-m // (_BAND * _TILE_ROWS // parts))


def _packed_slots(ahead: int) -> int:
    """Packed blocks in the ring of a tile of w, of two steps each."""
    return (ahead + 3) // 2


def _ring_bytes(ahead: int, segment: SegmentLike | None) -> int:
    """Bytes of the rings of weights, for so many steps that x is asked for ahead."""
    if segment is None:
        return (ahead + 1) * _BAND * _TILE_ROWS * _STEP_BYTES
    return int(_packed_slots(ahead) * _BAND * segment.format.packing.block_bytes)
