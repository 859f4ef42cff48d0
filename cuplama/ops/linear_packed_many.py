"""Launches of matrix products with a packed weight for 9 to 64 rows of x, on tensor cores. Kernels:
cuda_src/linear_packed_many.cu (sm_80 and later) and linear_packed_many_wgmma.cu (Hopper).

The plan is that of Marlin (Frantar et al., arXiv:2408.11743): weights stream once, each dequantised in registers for
all rows of x, and the units of work are dealt to one block a multiprocessor in equal runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .launch import Device, Launch, Plan
from .op import Call
from .weights import SegmentLike, segments_of

__all__ = ["MAX_MANY_ROWS", "Shape", "many_rows_docs", "many_rows_plan"]

MAX_MANY_ROWS = 128
"""Rows of x up to which this way is taken. A launch takes 64 of them, so more rows read the weight twice."""

_LAUNCH_ROWS = 64
_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 128  # of a packed weight
_STRIDE_BYTES = 288  # of 128 columns of a row of x in shared memory
_TILE_STRIDE = 20  # floats of a row of x and a tile of w, where sums go through shared memory
_RESERVED_BYTES = 2048  # of shared memory: what the driver keeps for itself, and the alignment of the Hopper kernel
_MAX_DEPTH = 6  # units in the ring
_MIN_DEPTH = 2
_WGMMA_FEW_BYTES = 1280  # of a block: up to that, Hopper's warpgroups are faster than single warps for 9 to 16 rows too
_BRINGERS = 4  # of the Hopper kernel: warps that bring x, and stages of it
_GATHER_THREADS = 256


@dataclass(frozen=True)
class Shape:
    """How the warps of a block share a unit of work: tiles of 16 rows of w by 128 columns.

    groups: of 8 rows of x; tiles: of a warp; slices: warps that share their tiles, each with a part of the columns;
    wgmma: the kernel for Hopper; depth: units in the ring at most.
    """

    groups: int
    tiles: int
    warps: int
    slices: int = 1
    wgmma: bool = False
    depth: int = _MAX_DEPTH

    @property
    def teams(self) -> int:
        return self.warps // self.slices

    @property
    def band(self) -> int:
        """Tiles of a unit."""
        return self.teams * self.tiles

    @property
    def sums(self) -> int:
        """Float32 sums of a thread."""
        return self.tiles * self.groups * 4

    def stage_bytes(self, block_bytes: int) -> int:
        """Shared memory of a unit in the ring."""
        return self.band * block_bytes + (0 if self.wgmma else self.groups * 8 * _STRIDE_BYTES)

    def other_bytes(self) -> int:
        """Shared memory beside the ring: what the sums go through at the end, and the Hopper kernel's stages of x."""
        end = max((self.slices - 1) * self.sums * 32, 16 * _TILE_STRIDE)
        stages = _BRINGERS if self.wgmma else 0
        return 4 * self.teams * end + stages * 2 * _BLOCK_COLUMNS * 8 * self.groups


# For up to that many groups of 8 rows of x: what is tried, the first that shared memory allows.
_SHAPES: Mapping[int, tuple[Shape, ...]] = {
    2: (Shape(2, 2, 8), Shape(2, 1, 8), Shape(2, 1, 2)),
    4: (Shape(4, 2, 8), Shape(4, 1, 4), Shape(4, 1, 2)),
    6: (Shape(6, 2, 8, 2), Shape(6, 1, 4), Shape(6, 1, 2)),
    8: (Shape(8, 2, 8, 2), Shape(8, 1, 4), Shape(8, 1, 2)),
}
# The same for Hopper's warpgroups, with a tile for each warp: (warps, depth), of which the cheapest is taken. Two tiles
# for each lost at every size: bands are then so few and so tall that blocks leave each other more sums.
_WGMMA_SHAPES: Mapping[int, tuple[tuple[int, int], ...]] = {
    2: ((12, 6),),
    4: ((12, 6), (8, 6)),
    6: ((12, 6), (8, 6)),
    8: ((12, 3), (8, 6)),
}


@dataclass(frozen=True)
class Cost:
    """Microseconds of a Hopper launch, fitted to times on an H200: most of a unit's are those of its bytes."""

    unit: float = 0.2
    weight_kilobyte: float = 0.028  # of a unit: from memory
    x_kilobyte: float = 0.02  # of a unit: from L2
    sums: float = 0.009  # for each tile of a unit and row of x: of sums that blocks leave for others

    def of(self, shape: Shape, block_bytes: int, units: float) -> float:
        """units: of a multiprocessor."""
        rows = 8 * shape.groups
        weight, x = shape.band * block_bytes / 1024, rows * _BLOCK_COLUMNS * 2 / 1024
        each = self.unit + weight * self.weight_kilobyte + x * self.x_kilobyte
        return units * each + self.sums * shape.band * rows


def many_rows_plan(kernel: str, call: Call, device: Device, shapes: Sequence[Shape] = ()) -> Plan | None:
    """The launches of ``linear`` or ``linear_add`` with a packed weight; None where this way is not possible: float32,
    GPUs before sm_80, too many rows of x, or a format too large for the shared memory.

    kernel: the op's name; shapes: what to try in place of the shapes that were found best. The rows of x are taken 64
    at a time, segment by segment. A deterministic device takes any number of rows in the shape for 64, since the shape
    decides the order of additions.
    """
    n, T = call["n"], call.dtypes["T"]
    segments = segments_of(call.arrays["w"])
    if segments is None or T.itemsize != 2 or device.arch < 80 or (n > MAX_MANY_ROWS and not device.deterministic):
        return None
    launches: list[Launch] = []
    needs = {"partial": 0, "arrivals": 0}
    column = 0
    for i, segment in enumerate(segments):
        names = {"w": f"w.{i}"}
        if segment.order is not None:
            launches.append(_gather(call, i))
            names["x"] = "gathered"
        for first in range(0, n, _LAUNCH_ROWS):
            rows = _LAUNCH_ROWS if device.deterministic else min(n - first, _LAUNCH_ROWS)
            wanted = shapes or _wanted(rows, call["k"], segment, device)
            shape = next((s for s in wanted if _depth(s, segment, device) >= _MIN_DEPTH), None)
            if shape is None:
                return None
            place = {"first": first, "column": column, "rows": segment.rows}
            launches.append(_launch(kernel, shape, segment, call["k"], device, names, place))
            for name, size in _scratch(shape, launches[-1], segment.rows):
                needs[name] = max(needs[name], size)
        column += segment.rows
    scratch: dict[str, tuple[tuple[int, ...], str]] = {
        "partial": ((needs["partial"],), "f32"),
        "arrivals": ((needs["arrivals"],), "u32"),
    }
    if any(segment.order is not None for segment in segments):
        scratch["gathered"] = ((n, call["k"]), "f16" if T.kind == "f" else "bf16")
    return Plan(tuple(launches), scratch, frozenset({"arrivals"}))


def many_rows_docs(kernel: str, formula: str) -> dict[str, str]:
    """What the kernels compute, by their names."""
    what = f"{formula} for up to 64 rows of x and a packed weight, on tensor cores"
    return {f"{kernel}_packed_many": what, f"{kernel}_packed_many_wgmma": f"{what} of Hopper"}


def _gather(call: Call, segment: int) -> Launch:
    grid = (-(-call["k"] // _GATHER_THREADS), call["n"])
    return Launch(
        "linear_packed_many.cu:gather_columns", grid, (_GATHER_THREADS,), names={"order": f"w.{segment}.order"}
    )


def _wanted(rows: int, k: int, segment: SegmentLike, device: Device) -> Sequence[Shape]:
    """How the warps of a block may share the work for that many rows of x, best first."""
    groups = next(g for g in _SHAPES if 8 * g >= rows)
    block_bytes = segment.format.packing.block_bytes
    if device.arch != 90 or (groups == 2 and block_bytes > _WGMMA_FEW_BYTES):
        return _SHAPES[groups]

    def cost(shape: Shape) -> float:
        return Cost().of(shape, block_bytes, _units(shape, segment.rows, k) / device.sms)

    hopper = (Shape(groups, 1, warps, wgmma=True, depth=depth) for warps, depth in _WGMMA_SHAPES[groups])
    return (*sorted(hopper, key=cost), *_SHAPES[groups])


def _depth(shape: Shape, segment: SegmentLike, device: Device) -> int:
    room = device.shared - _RESERVED_BYTES - shape.other_bytes()
    return min(shape.depth, room // shape.stage_bytes(segment.format.packing.block_bytes))


def _launch(
    kernel: str,
    shape: Shape,
    segment: SegmentLike,
    k: int,
    device: Device,
    names: Mapping[str, str],
    place: Mapping[str, Any],
) -> Launch:
    """One launch: 64 rows of x at most, with a segment."""
    packing = segment.format.packing
    units = _units(shape, segment.rows, k)
    depth = _depth(shape, segment, device)
    used = depth * shape.stage_bytes(packing.block_bytes) + shape.other_bytes() + _RESERVED_BYTES // 2
    constants = {"W": packing.type, "NTILES": shape.groups, "TILES": shape.tiles, "WARPS": shape.warps}
    constants |= {"DEPTH": depth, **place}
    if shape.wgmma:
        name = f"linear_packed_many_wgmma.cu:{kernel}_packed_many_wgmma"
    else:
        name = f"linear_packed_many.cu:{kernel}_packed_many"
        constants["SLICES"] = shape.slices
    warps = shape.warps + (_BRINGERS if shape.wgmma else 0)
    # Two blocks do not fit a multiprocessor, so those of the next kernel are dealt out evenly.
    shared = max(used, device.shared // 2)
    return Launch(name, (min(device.sms, units),), (32 * warps,), shared, constants, names)


def _units(shape: Shape, rows: int, k: int) -> int:
    return _bands(shape, rows) * -(-k // _BLOCK_COLUMNS)


def _bands(shape: Shape, rows: int) -> int:
    return -(-rows // (_BLOCK_ROWS * shape.band))


def _scratch(shape: Shape, launch: Launch, rows: int) -> Iterator[tuple[str, int]]:
    """Elements of the scratch buffers that a launch needs."""
    yield "partial", launch.grid[0] * shape.teams * shape.sums * 32
    yield "arrivals", _bands(shape, rows) * shape.teams
