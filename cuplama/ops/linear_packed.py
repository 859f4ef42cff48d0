"""Products of a few rows with a packed weight. Kernels: cuda_src/linear_packed.cu; ``quant/packed.py`` says what a
packed weight is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..dtypes import dtype_name
from .launch import Device, Launch, Plan
from .op import Call
from .signature import OpError
from .weights import SegmentLike

__all__ = ["MAX_FEW_ROWS", "plan_packed"]

MAX_FEW_ROWS = 8
"""Rows of x that one launch takes."""

_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 128  # of a packed block
_STEP = 2  # units of tiles between two barriers; STEP in linear_packed.cuh
_RESERVED_BYTES = 5 << 10  # of shared memory: the kernels' static arrays, and what the driver keeps for itself

# What to try where a kernel is too slow:
# - How the warps of a GPU block divide a row of blocks: the most warps, and the most packed blocks of columns that one has
#   in a phase (8 chunks of x each, 16 registers; longer rows go in phases). The first is taken that leaves room
#   for a ring. Many warps have short slices and drain the ring faster.
_DIVISIONS = ((16, 4), (16, 2), (16, 1), (8, 2), (8, 1), (4, 1))
_NORMED_BLOCKS = 2  # at most, of 8 rows of x that are normalised: each thread holds them in registers before
_STAGED_DIVISIONS = ((8, 1), (4, 1))  # without tensor cores: x of a phase is in shared memory, as float32
# - The ring of a warp, in slices of a tile, and of all warps, in bytes: what is on its way from memory.
_MIN_DEPTH, _MAX_DEPTH = 2, 6
_MAX_RING_BYTES = 64 << 10
# - Whether a GPU block has a multiprocessor for itself, so that those of the next kernel are dealt out evenly.
_ALONE = True

_PRODUCTS = "products"  # scratch: what silu_mul takes, where it is a launch of its own
_ACTIVATION_THREADS = 128


@dataclass(frozen=True)
class _Slices:
    """How the warps of a GPU block divide a row of blocks."""

    warps: int
    blocks: int
    phases: int


def _slices(columns: int, most: int, blocks: int) -> _Slices:
    """columns: packed blocks of a row of blocks; most: warps. As few phases as possible, then equal slices."""
    phases = -(-columns // (most * blocks))
    each = -(-columns // (most * phases))
    warps = min(most, -(-columns // (each * phases)))
    return _Slices(warps, each, -(-columns // (warps * each)))


@dataclass(frozen=True)
class _Sizes:
    """What shared memory holds. rows: of x; parts: tiles of a unit; units: of a GPU block, at most; staged: bytes of an
    element of x there."""

    rows: int
    parts: int
    units: int
    staged: int

    def bytes(self, s: _Slices) -> int:
        """Bytes beside the ring."""
        unit = _BLOCK_ROWS * self.rows * 4 * self.parts  # sums
        sums = 2 * s.warps * _STEP * unit + (self.units * unit if s.phases > 1 else 0)
        return sums + self.rows * self.staged * (s.warps * s.blocks * _BLOCK_COLUMNS + 16)

    def divide(
        self, columns: int, block_bytes: int, tensor: bool, normed: bool, room: int
    ) -> tuple[_Slices, int] | None:
        """The division of rows of blocks that leaves room for a ring, and how many slices deep that is."""
        for most, blocks in _DIVISIONS if tensor else _STAGED_DIVISIONS:
            if normed and self.rows > 1 and blocks > _NORMED_BLOCKS:
                continue
            s = _slices(columns, most, blocks)
            slot = s.warps * s.blocks * block_bytes
            depth = min((room - self.bytes(s)) // slot, max(_MIN_DEPTH, _MAX_RING_BYTES // slot), _MAX_DEPTH)
            if depth >= _MIN_DEPTH:
                return s, depth
        return None


def _tensor(call: Call, device: Device) -> bool:
    return call.dtypes["T"].itemsize == 2 and device.arch >= 80


def _launch(
    kernel: str,
    call: Call,
    device: Device,
    first: int,
    segment: tuple[int, SegmentLike],
    column: int,
    constants: Mapping[str, Any],
) -> Launch:
    """The launch for up to 8 rows of x from ``first`` on, and one segment of w, whose first row is ``column``."""
    number, weight = segment
    n, k, tensor, normed = call["n"], call["k"], _tensor(call, device), "g" in call.arrays
    parts = 2 if constants.get("ACT") == "SILU_MUL" else 1
    rows_of_x = 1 if n - first == 1 else MAX_FEW_ROWS
    outs = weight.rows // parts  # columns of y
    units = -(-outs // _BLOCK_ROWS)  # a tile, for silu_mul one of each half
    blocks = min(device.sms, units)
    levels = 2 if normed and constants.get("U") == "f32" else 1
    sizes = _Sizes(rows_of_x, parts, -(-units // blocks), (2 * levels if normed else 0) if tensor else 4)
    block_bytes = weight.format.packing.block_bytes
    room = device.shared - _RESERVED_BYTES
    divided = sizes.divide(-(-k // _BLOCK_COLUMNS), block_bytes, tensor, normed, room)
    if divided is None:
        raise OpError(f"{call.op.name}: {device.shared} bytes of shared memory are too few for {weight.format.name}")
    slices, depth = divided
    shared = depth * slices.warps * slices.blocks * block_bytes + sizes.bytes(slices)
    return Launch(
        f"linear_packed.cu:{kernel}_packed",
        (blocks,),
        (32 * slices.warps,),
        max(shared, device.shared // 2) if _ALONE else shared,
        constants={
            **constants,
            "W": weight.format.packing.type,
            "ROWS": rows_of_x,
            "WARPS": slices.warps,
            "BLOCKS": slices.blocks,
            "PHASES": slices.phases,
            "DEPTH": depth,
            "ORDERED": weight.order is not None,
            "first": first,
            "rows": outs,
            "column": column,
        },
        names={"w": f"w.{number}", "order": f"w.{number}.order"},
    )


def plan_packed(
    kernel: str, call: Call, device: Device, segments: Sequence[SegmentLike], constants: Mapping[str, Any]
) -> Plan:
    """Launches of a kernel of linear_packed.cu: for each 8 rows of x, one for each segment of w.

    kernel: ``linear``, ``linear_add``, ``rms_norm_linear`` or ``layer_norm_linear``; constants: the kernel's own.
    ``silu_mul`` whose halves do not begin with a packed block, or that has several segments, is a launch of its own
    behind a product into scratch.
    """
    n, m = call["n"], call["m"]
    apart = constants.get("ACT") == "SILU_MUL" and (m % _BLOCK_ROWS != 0 or len(segments) > 1)
    if apart:
        constants = {**constants, "ACT": "NO_ACT", "m": 2 * m}
    launches = []
    for first in range(0, n, MAX_FEW_ROWS):
        column = 0
        for i, segment in enumerate(segments):
            launch = _launch(kernel, call, device, first, (i, segment), column, constants)
            launches.append(replace(launch, names={**launch.names, "y": _PRODUCTS}) if apart else launch)
            column += segment.rows
    if not apart:
        return Plan(tuple(launches))
    grid = (n, -(-m // (8 * _ACTIVATION_THREADS)))
    names = {"x": _PRODUCTS}
    launches.append(Launch("activation.cu:silu_mul", grid, (_ACTIVATION_THREADS,), constants={"f": m}, names=names))
    return Plan(tuple(launches), {_PRODUCTS: ((n, 2 * m), dtype_name(call.dtypes["T"]))})
