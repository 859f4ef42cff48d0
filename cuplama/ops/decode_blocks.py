"""How attention_decode.cu shares out the keys of a decode step among blocks, on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .launch import Device

__all__ = [
    "BLOCKS",
    "MAX_TENSOR_HEAD",
    "WIDE_BLOCKS",
    "DecodeBlocks",
    "decode_blocks",
    "on_tensor_cores",
    "room_bytes",
]


class DecodeBlocks(NamedTuple):
    """A way to share out the keys on tensor cores. warps: of a block; keys: of a split, at least, a multiple of 16;
    stages: tiles of 16 keys that a warp has on their way through shared memory, 0 for two in registers; places: blocks
    that a multiprocessor holds, as the registers allow: of 2 warps 4, since with 5 a thread has 168, and some spill;
    alone: so many keys are one split, although ``keys`` are fewer, since adding up splits takes its time."""

    warps: int
    keys: int
    stages: int
    places: int
    alone: int = 0


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
# The same for heads of more than 128 dims, whose tiles go through shared memory always: a warp has 16 KB of keys and
# values of 256 dims on their way in a stage. Other choices have not been timed; the reasons are estimates.
#
# With 6 warps two blocks fit on a multiprocessor, or one beside a block of linear.cu, which takes half of the shared
# memory: so a step's attention may begin to read its keys while the product before it runs. They have 96 keys on their
# way. Each further 96 cost about a microsecond, and adding up splits costs 1.7: so up to 192 keys are one split, and
# more are splits of 96. Where there are more pairs than multiprocessors, smaller blocks even out, too.
WIDE_BLOCKS: Sequence[tuple[int, DecodeBlocks]] = (
    (1024, DecodeBlocks(2, 1024, 1, 4)),
    (512, DecodeBlocks(4, 1024, 1, 2)),
    (133, DecodeBlocks(6, 1024, 1, 2)),
    (32, DecodeBlocks(6, 256, 1, 2)),
    (0, DecodeBlocks(6, 96, 1, 2, 192)),
)
MAX_TENSOR_HEAD = 512
"""Dims of the largest heads that go through tensor cores; others are computed by multiply-adds."""

_PLAIN_BLOCKS = DecodeBlocks(4, 64, 0, 2)  # without tensor cores
_MAX_HELD_HEAD = 128  # dims of the largest heads whose tiles registers can hold; HELD in attention_decode_ring.cuh
_WARPS, _WIDEST_WARPS = 12, 8  # of a multiprocessor, as registers hold the sums of up to 256 dims, and of more
_TILE = 16  # keys that a warp takes at a time
_STORE = 16  # bytes that are copied to shared memory at once
_DRIVER_BYTES = 1024  # of a multiprocessor's shared memory, which the driver takes for each block


def on_tensor_cores(D: int, T: int, C: int, device: Device) -> bool:
    """Whether decode attention multiplies on tensor cores. T, C: bytes of a number of x, and of the cache."""
    rings = D * C % _STORE == 0
    return device.arch >= 80 and T == 2 and D <= MAX_TENSOR_HEAD and (D <= _MAX_HELD_HEAD or rings)


def room_bytes(blocks: DecodeBlocks, Q: int, D: int, C: int) -> int:
    """Dynamic shared memory of a block of Q heads: rings, and later the sums of its warps (``ROOM`` of the kernel)."""
    if not blocks.stages:
        return 0
    sums = 4 * Q * (D + 4)
    rows = max(1, 32 * blocks.warps // (Q * D // 4))
    return max(blocks.warps * max(sums, blocks.stages * 2 * _TILE * D * C), 4 * rows * Q * D)


def decode_blocks(pairs: int, Q: int, D: int, C: int, device: Device, tensor: bool) -> DecodeBlocks:
    """For so many pairs of a sequence and a key head. Q: query heads of a block; C: bytes of a number of the cache.

    Where shared memory has no room for the tiles of all blocks, a multiprocessor holds fewer blocks or a block has
    fewer warps; but heads of 128 dims or less have their tiles in registers then, as where a row cannot be copied 16
    bytes at a time.
    """
    if not tensor:
        return _PLAIN_BLOCKS
    held = D <= _MAX_HELD_HEAD
    found = next(blocks for least, blocks in (BLOCKS if held else WIDE_BLOCKS) if pairs >= least)
    beside = 24 * D + 2048 + _DRIVER_BYTES  # about: queries, the new key and value, statistics
    room = device.shared + _DRIVER_BYTES

    def fits(blocks: DecodeBlocks) -> bool:
        return blocks.places * (room_bytes(blocks, Q, D, C) + beside) <= room

    if held:
        registers = found._replace(stages=0, places=8 // found.warps)
        return found if not found.stages or (D * C % _STORE == 0 and fits(found)) else registers
    widened = device.arch >= 100 and C == 1  # as compiled for Blackwell e4m3 takes a few registers more than there are
    most = _WARPS if D <= 256 and not widened else _WIDEST_WARPS
    while found.places * found.warps > most or not fits(found):
        less = {"places": found.places - 1} if found.places > 1 else {"warps": found.warps - 1}
        found = found._replace(**less)
    return found
