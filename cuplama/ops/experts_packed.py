"""Products of rows with packed weights of experts. Kernel for few pairs: cuda_src/experts_packed.cu, which streams the
blocks of the experts that were chosen. For many pairs: those of experts_many.py, which make the numbers of the codes
inside the tiles of the product.

What these do not take is multiplied by the kernels of plain weights, of some experts at a time, whose weights are
unpacked to scratch (unpack.cu). A packed weight of experts is one segment: the rows of each expert,
up to a whole number of packed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Any

from ..dtypes import dtype_name
from .experts_many import MOST_PAIRS, many_launch, takes_many
from .launch import Device, Launch, Plan
from .linear_packed import MAX_FEW_ROWS, Sizes, Tuning, block_sums, staged_tuning
from .op import Call
from .signature import OpError
from .unpacking import UNPACKED, unpack_launches
from .weights import SegmentLike, expert_rows, segments_of

__all__ = [
    "AHEAD_ROWS",
    "AHEAD_TUNING",
    "TUNING",
    "TWINS",
    "WAYS",
    "Ways",
    "packed_experts_plan",
    "unpacked_experts",
]


@dataclass(frozen=True)
class Ways:
    """Which way a product with a packed weight is computed, by the pairs for each expert of the model.

    streamed: up to so many, blocks are streamed, once for each tile of pairs of an expert, of up to 16; in_tiles:
    whether for more, codes become numbers inside the tiles of a product, once for each tile, where the kernels take it;
    else they are unpacked to scratch, once. rows: pairs of a tile of the product at most; streamed_rows: of a streamed
    one (1, 2, 4, 8 or 16), or None for as many as are likely.
    """

    streamed: int = 12
    in_tiles: bool = True
    rows: int = MOST_PAIRS
    streamed_rows: int | None = None


WAYS = Ways()
"""What is taken: ``python -m benchmarks.packed_experts`` times all ways. On an H200 tiles are faster than scratch for
any number of pairs: 8,192 tokens of gpt-oss-20b, 1,024 pairs of an expert, in 2.15 ms and 2.74 ms. Blocks that are
streamed are faster up to some 12 pairs: 130 and 185 us with 8, 187 and 186 with 16."""

TUNING = Tuning(ahead=2, behind=5, steps=(4, 2))
"""How blocks are streamed (experts_packed.cu): as with rows of one weight, but that ``behind`` does not ask how long x
is. There are fewer warps, and steps between two barriers, where shared memory would leave too little to the ring. To be
measured."""

TWINS = 2
"""Packed blocks that a warp takes together, of two tiles with the same columns, so that it reads x once for both: 2 or
1."""

_STREAMED_ROWS = ((8, 5), (16, inf))
"""Pairs that a streamed tile may have, and pairs of an expert, on the average, up to which no more are taken. Each tile
reads the weights of its expert, and with 5 pairs one in 15 has more than 8 by chance; but for more rows x and its sums
leave less of shared memory to the ring. Gate and up of Qwen3-30B-A3B in int4 took, on an H200, with tiles of 8 and 16
pairs 66 and 87 us at 4 pairs of an expert, 97 and 92 at 8; of gpt-oss-20b at 8 pairs 146 and 132. With 32 no more was
gained."""

AHEAD_ROWS = 2
"""Pairs of a tile up to which the rings of a product that is not gated are filled while the kernel directly ahead makes
x, if another chose the experts, where a kernel can start early (sm_90); 0 for never."""

AHEAD_TUNING = Tuning(ahead=2, behind=13, steps=(4, 2))
"""How blocks are streamed by a GPU block that is to have its place beside one of the kernel ahead: its rings are as
deep as the room that is left, up to this. A token of gpt-oss-20b took 1.673 ms on an H200, without reading ahead 1.708.

The kernel ahead is taken to be the gated product of the same experts. Of gpt-oss-20b, with MXFP4 and one row, its block
takes 126,208 of the 233,472 bytes of shared memory of a multiprocessor of an H200 (122,944, static arrays of 2,192 and
1,024 that are reserved, in units of 128), and that of the product behind it 100,608: together 226,816. With two rows
these are 132,480 and 89,472. Of the 65,536 registers the 12 warps of one have 36,864 and the eight of the other 24,576,
with 96 for a thread."""

_AHEAD_WARPS = 20
"""Of both blocks: a quarter of a multiprocessor has 16,384 registers, so 5 warps with 96 for a thread, and up to two
pairs of a tile take no more. The warps of a block are dealt to the quarters one by one. What leaves fewer than 8 warps
to the kernel behind is left as it is: Qwen3-30B-A3B has 16 warps ahead."""

_AROUND_BYTES = 2192 + 1024 + 127
"""Of shared memory, beside what a block asks for: static arrays, what is reserved, and up to a whole unit of 128."""

_FEWER_WARPS = 8  # of a block that streams, where sums of more leave a ring too little
_ENOUGH_BYTES, _LEAST_BYTES = 32 << 10, 24 << 10
"""Bytes of weights on their way to a multiprocessor that hide how long they take; and what more than 8 pairs of a tile
must leave to that."""

_AHEAD = ("pairs", "offsets")  # what the kernel can read before x is there
_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 128  # of a packed block
_WARP = 32
_SLICE_BYTES = 256 << 20  # of unpacked numbers, at most, unless one expert has more


def unpacked_experts(E: int, rows: int, k: int, itemsize: int) -> int:
    """How many of E experts of that many rows are unpacked at a time. itemsize: of a number."""
    return min(E, max(1, _SLICE_BYTES // (rows * k * itemsize)))


def packed_experts_plan(
    constants: Mapping[str, Any],
    parts: int,
    call: Call,
    device: Device,
    plain: Callable[[int], Launch],
    ways: Ways | None = None,
) -> Plan:
    """The launches of a product with a packed weight.

    constants: those of all its kernels; parts: rows of w that make a column of y; plain: the launch for the plain
    weights of so many experts; ways: ``WAYS`` if None.
    """
    ways = ways or WAYS
    segments = segments_of(call.arrays["w"])
    assert segments is not None
    if len(segments) != 1 or segments[0].order is not None:
        raise OpError(f"{call.op.name}: the experts of a packed weight have one format, and no order of columns")
    pairs, whole = call["n"] * call["s"], parts == 1 or call["m"] % _BLOCK_ROWS == 0
    launch = None
    if whole and not device.deterministic:  # which has one way to add up, whatever the number of rows
        if pairs <= ways.streamed * call["E"]:
            launch = _few(constants, parts, call, device, segments[0], ways.streamed_rows)
        if launch is None and ways.in_tiles and takes_many(call, device, segments[0]):
            launch = many_launch(constants, parts, call, device, call["E"], segments[0], ways.rows)
    if launch is not None:
        return Plan((launch,))
    rows = parts * call["m"]
    each = unpacked_experts(call["E"], rows, call["k"], call.dtypes["T"].itemsize)
    launches: list[Launch] = []
    for first in range(0, call["E"], each):
        count = min(each, call["E"] - first)
        launches += _unpacked(segments[0], rows, call["k"], first, count)
        launch = plain(count)
        starts = {name: first for name in ("offsets", "b") if first and call.arrays[name] is not None}
        launches.append(replace(launch, names={**launch.names, "w": UNPACKED}, starts=starts))
    return Plan(tuple(launches), {UNPACKED: ((each * rows, call["k"]), dtype_name(call.dtypes["T"]))})


def _streamed_rows(call: Call, tensor: bool, given: int | None) -> list[int]:
    """Pairs that a streamed tile may have, the best first. given: the most."""
    each = call["n"] * call["s"] / call["E"]
    likely = next(rows for rows, up_to in _STREAMED_ROWS if each <= up_to)
    most = min(given or likely, 2 * call["n"] - 1)  # an expert has a row once
    some = (1, 2, 4, *(rows for rows, _ in _STREAMED_ROWS if tensor or rows <= MAX_FEW_ROWS))
    return [rows for rows in reversed(some) if rows <= most]


_Way = tuple[dict[str, int], int, int]  # constants, bytes of shared memory, bytes on their way


def _divisions(
    rows: int, parts: int, columns: int, packing: Any, tensor: bool, device: Device, tuning: Tuning
) -> Iterator[_Way]:
    """The ways for a block of the grid to divide its work: constants, bytes of shared memory, and bytes of weights that
    are on their way while others are multiplied, which are enough where a ring is as deep as ``tuning`` says."""
    tuning = tuning if tensor else staged_tuning(tuning)
    most = tuning.warps[rows > 1]
    some = sorted({most, min(most, _FEWER_WARPS)}, reverse=True)
    steps = range(tuning.steps[rows > 1], 0, -1)
    for twins, warps, step in product((TWINS, 1) if tensor and TWINS > 1 else (1,), some, steps):
        if step * parts % twins:
            continue
        sizes = Sizes(rows, parts, 0, 2 if tensor else 4, block_sums(packing), step, 1)
        slot, slots = twins * packing.block_bytes, -(-(tuning.ahead + tuning.behind + 1) // twins)
        ring = replace(tuning, warps=(warps, warps), ahead=slots - 1, behind=0)
        divided = sizes.divide(columns, slot, ring, device)
        if divided is None or divided[0].phases > 1:
            continue
        shape, depth, _ = divided
        own = {
            "ROWS": rows, "WARPS": shape.warps, "BLOCKS": shape.blocks, "DEPTH": depth,
            "EARLY": min(max(1, tuning.ahead // twins), depth - 1), "STEP": step, "TWINS": twins,
        }  # fmt: skip
        ahead = _ENOUGH_BYTES if depth == slots else (depth - 1) * shape.warps * slot
        yield own, depth * shape.warps * slot + sizes.bytes(shape), ahead


def _best(ways: Sequence[_Way]) -> _Way:
    """Of equals the first."""
    return max(ways, key=lambda way: min(way[2], _ENOUGH_BYTES))


def _beside(rows: int, call: Call, packing: Any, device: Device) -> Iterator[_Way]:
    """The ways whose block has its place beside one of the gated product that makes x, of as many elements as this has
    columns, and whose ring is worth it. On tensor cores."""
    columns, elements = -(-call["k"] // _BLOCK_COLUMNS), -(-call["m"] // _BLOCK_COLUMNS)
    ahead = list(_divisions(rows, 2, elements, packing, True, device, TUNING))
    if not ahead:
        return
    other, shared, _ = _best(ahead)
    taken = max(shared, device.shared // 2) + _AROUND_BYTES
    warps = _AHEAD_WARPS - -(-other["WARPS"] // 4) * 4
    if warps < _FEWER_WARPS:
        return
    left = replace(device, shared=device.shared + (1 << 10) - taken)  # a multiprocessor has 1 KB more than a block
    for way in _divisions(rows, 1, columns, packing, True, left, replace(AHEAD_TUNING, warps=(warps, warps))):
        if way[2] >= _ENOUGH_BYTES:
            yield way


def _few(
    constants: Mapping[str, Any], parts: int, call: Call, device: Device, segment: SegmentLike, given: int | None
) -> Launch | None:
    """The launch for few pairs; None where a row of x does not fit a block's shared memory."""
    packing, m, pairs = segment.format.packing, call["m"], call["n"] * call["s"]
    tensor = call.dtypes["T"].itemsize == 2 and device.arch >= 80
    for rows in _streamed_rows(call, tensor, given):
        columns = -(-call["k"] // _BLOCK_COLUMNS)
        possible = tensor and device.arch >= 90 and parts == 1 and rows <= AHEAD_ROWS
        beside = list(_beside(rows, call, packing, device)) if possible else []
        ways = beside or list(_divisions(rows, parts, columns, packing, tensor, device, TUNING))
        if not ways or (rows > MAX_FEW_ROWS and max(ahead for _, _, ahead in ways) < _LEAST_BYTES):
            continue
        own, shared, _ = _best(ways)
        most = pairs // rows + min(call["E"], pairs)  # tiles
        return Launch(
            "experts_packed.cu:expert_linear_packed",
            (min(device.sms, most * -(-m // _BLOCK_ROWS)),),
            (_WARP * own["WARPS"],),
            # Two do not fit, so those of the next kernel are dealt out evenly.
            shared if beside else max(shared, device.shared // 2),
            {**constants, **own, "W": packing.type, "ahead": 0},
            {"w": "w.0"},
            ahead=_AHEAD if beside else (),
            waits_first=True,
        )
    return None


def _unpacked(segment: SegmentLike, rows: int, k: int, first: int, count: int) -> Iterator[Launch]:
    """The launches that write the weights of some experts to scratch, one behind the other."""
    held = expert_rows(rows)
    together = count if held == rows else 1  # experts that lie in the segment as they are to lie in scratch
    for expert in range(first, first + count, together):
        start = expert * held
        for launch in unpack_launches([segment], k, start, start + together * rows):
            to = launch.constants["to"] + (expert - first) * rows
            yield replace(launch, constants={**launch.constants, "to": to})
