"""Products of rows with packed weights of experts. Kernel for few pairs: cuda_src/experts_packed.cu, which streams the
blocks of the experts that were chosen. For many pairs: those of experts_many.py, which make the numbers of the codes
inside the tiles of the product.

What these do not take is multiplied by the kernels of plain weights, of some experts at a time, whose weights are
unpacked to scratch (unpack.cu). A packed weight of experts is one segment: the rows of each expert,
up to a whole number of packed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..dtypes import dtype_name
from .experts_many import MOST_PAIRS, many_launch, takes_many
from .launch import Device, Launch, Plan
from .linear_packed import ROWS, TUNING, Sizes, block_sums, staged_tuning
from .op import Call
from .signature import OpError
from .unpacking import UNPACKED, unpack_launches
from .weights import SegmentLike, expert_rows, segments_of

__all__ = ["WAYS", "Ways", "packed_experts_plan", "unpacked_experts"]


@dataclass(frozen=True)
class Ways:
    """Which way a product with a packed weight is computed, by the pairs for each expert of the model.

    streamed: up to so many, blocks are streamed, once for each 8 pairs of an expert; in_tiles: whether for more, codes
    become numbers inside the tiles of a product, once for each tile, where the kernels take it; else they are unpacked
    to scratch, once. rows: pairs of a tile at most.
    """

    streamed: int = 32
    in_tiles: bool = True
    rows: int = MOST_PAIRS


WAYS = Ways()
"""What is taken: ``python -m benchmarks.packed_experts`` times all ways. On an H200 tiles are faster than scratch for
any number of pairs: 8,192 tokens of gpt-oss-20b, 1,024 pairs of an expert, in 2.15 ms and 2.74 ms."""

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
            launch = _few(constants, parts, call, device, segments[0])
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


def _few(constants: Mapping[str, Any], parts: int, call: Call, device: Device, segment: SegmentLike) -> Launch | None:
    """The launch for few pairs; None where a row of x does not fit a block's shared memory."""
    packing, m, k, pairs = segment.format.packing, call["m"], call["k"], call["n"] * call["s"]
    tensor = call.dtypes["T"].itemsize == 2 and device.arch >= 80
    tuning = TUNING if tensor else staged_tuning()
    for rows in reversed([r for r in ROWS if r < 2 * call["n"]]):  # an expert has a row once
        step = tuning.steps[rows > 1]
        sizes = Sizes(rows, parts, 0, 2 if tensor else 4, block_sums(packing), step, 1)
        divided = sizes.divide(-(-k // _BLOCK_COLUMNS), packing.block_bytes, tuning, device)
        if divided is None or divided[0].phases > 1:
            continue
        shape, depth, _ = divided
        own = {
            **constants, "W": packing.type, "ROWS": rows, "WARPS": shape.warps, "BLOCKS": shape.blocks, "DEPTH": depth,
            "STEP": step,
        }  # fmt: skip
        most = pairs // rows + min(call["E"], pairs)  # tiles
        shared = depth * shape.warps * packing.block_bytes + sizes.bytes(shape)
        return Launch(
            "experts_packed.cu:expert_linear_packed",
            (min(device.sms, most * -(-m // _BLOCK_ROWS)),),
            (_WARP * shape.warps,),
            max(shared, device.shared // 2),  # two do not fit, so those of the next kernel are dealt out evenly
            own,
            {"w": "w.0"},
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
