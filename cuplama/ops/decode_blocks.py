"""How attention_decode.cu shares out the keys of a decode step among blocks, on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .launch import Device

__all__ = ["BLOCKS", "TILE", "DecodeBlocks", "decode_blocks"]


class DecodeBlocks(NamedTuple):
    """A way to share out the keys on tensor cores. warps: of a block; keys: of a split, at least; stages: tiles of 16
    keys that a warp has on their way through shared memory, 0 for two in registers; places: blocks that a
    multiprocessor holds, as the registers allow: of 2 warps 4, since with 5 a thread has 168, and some spill."""

    warps: int
    keys: int
    stages: int
    places: int


# (pairs of sequence and key head, at least; blocks). One sequence needs many blocks for its keys, each with as many
# keys on their way as a multiprocessor can have. Where there are more pairs than multiprocessors, what counts is that
# one block begins or ends while others read. Microseconds on an H200, 32 query and 8 key heads of 128
# (benchmarks/results/2026-11-28-h200-attention-rings.txt has more ways):
#                       warps, keys, stages:  8, 256, 0   4, 1024, 0   2, 1024, 0   4, 1024, 2   2, 1024, 3   2, 1024, 2
#     16 sequences of 512 keys                  20.3         16.9         28.5         14.9         22.7         24.2
#     64 of 512                                 80.3         45.0         42.2         42.3         39.7         48.6
#     64 of 2048                               234.4        162.2        180.8        154.9        157.4        162.0
#     512 of 16                                144.4         87.1         59.1         85.3         54.8         46.8
#     512 of 576                               630.3        346.7        334.7        330.7        319.9        317.5
#     512 of 576, e4m3 cache                   482.1        252.8        231.7        183.7        173.8        178.5
BLOCKS: Sequence[tuple[int, DecodeBlocks]] = (
    (1024, DecodeBlocks(2, 1024, 2, 4)),
    (512, DecodeBlocks(2, 1024, 3, 4)),
    (128, DecodeBlocks(4, 1024, 2, 2)),
    (64, DecodeBlocks(4, 256, 0, 2)),
    (0, DecodeBlocks(8, 256, 0, 1)),
)
_PLAIN_BLOCKS = DecodeBlocks(4, 64, 0, 2)  # without tensor cores
TILE = 16  # keys that a warp takes at a time
_OTHER_BYTES = 8192  # of shared memory, about: what a block has beside tiles


def decode_blocks(pairs: int, row: int, device: Device, tensor: bool) -> DecodeBlocks:
    """For so many pairs of a sequence and a key head. row: bytes of a key. Tiles go through shared memory where their
    rows can be copied 16 bytes at a time, and where there is room for those of all blocks."""
    if not tensor:
        return _PLAIN_BLOCKS
    found = next(blocks for least, blocks in BLOCKS if pairs >= least)
    needed = found.places * (found.warps * found.stages * 2 * TILE * row + _OTHER_BYTES)
    if found.stages and (row % 16 or needed > device.shared):
        return found._replace(stages=0, places=8 // found.warps)  # as registers hold tiles
    return found
