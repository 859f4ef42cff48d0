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

__all__ = ["MAX_FEW_ROWS", "TUNING", "Tuning", "plan_packed"]

MAX_FEW_ROWS = 8
"""Rows of x that one launch takes."""

_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 128  # of a packed block
_RESERVED_BYTES = 5 << 10  # of shared memory: the kernels' static arrays, and what the driver keeps for itself


@dataclass(frozen=True)
class Tuning:
    """What decides how fast the kernels are.

    divisions: how the warps of a GPU block divide a row of blocks: the most warps, and the most packed blocks that one
    has in a phase (8 chunks of x each, 16 registers; longer rows go in phases). The first is taken that leaves room for
    a ring. Many warps have short slices and drain the ring faster. flight: bytes that a GPU block has asked for ahead
    of what it multiplies, where a slice for each warp is not more. steps: units of tiles between two barriers, for
    one row of x and for several. alone: whether a GPU block has a multiprocessor for itself, so that those of the next
    kernel are dealt out evenly; else the next kernel's may begin to read beside it, if registers allow it.
    """

    divisions: tuple[tuple[int, int], ...] = ((16, 4), (16, 2), (16, 1), (8, 2), (8, 1), (4, 1), (2, 1))
    flight: int = 72 << 10
    steps: tuple[int, int] = (4, 2)
    alone: bool = True


TUNING = Tuning()
# Registers for x of a phase, and for its sums over groups where a format has offsets: of one row of x, of several.
_MAX_REGISTERS = (64, 48)
_STAGED_DIVISIONS = (
    (8, 1),
    (4, 1),
    (2, 1),
    (1, 1),
)  # without tensor cores: x of a phase is in shared memory, as float32
_MIN_DEPTH, _MAX_DEPTH = 2, 6  # slices in a ring
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
    element of x there; step: units between two barriers."""

    rows: int
    parts: int
    units: int
    staged: int
    step: int

    def bytes(self, s: _Slices) -> int:
        """Bytes beside the ring."""
        unit = _BLOCK_ROWS * self.rows * 4 * self.parts  # sums
        sums = 2 * s.warps * self.step * unit + (self.units * unit if s.phases > 1 else 0)
        return sums + self.rows * self.staged * (s.warps * s.blocks * _BLOCK_COLUMNS + 16)

    def divide(
        self, columns: int, block_bytes: int, divisions: Sequence[tuple[int, int]], flight: int, room: int
    ) -> tuple[_Slices, int] | None:
        """The division of rows of blocks that leaves room for a ring, and how many slices deep that is."""
        for most, blocks in divisions:
            s = _slices(columns, most, blocks)
            slot = s.warps * s.blocks * block_bytes
            depth = min((room - self.bytes(s)) // slot, max(_MIN_DEPTH, 1 + flight // slot), _MAX_DEPTH)
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
    tuning: Tuning,
) -> Launch:
    """The launch for up to 8 rows of x from ``first`` on, and one segment of w, whose first row is ``column``."""
    number, weight = segment
    n, k, tensor, normed = call["n"], call["k"], _tensor(call, device), "g" in call.arrays
    parts = 2 if constants.get("ACT") == "SILU_MUL" else 1
    rows_of_x = 1 if n - first == 1 else MAX_FEW_ROWS
    outs = weight.rows // parts  # columns of y
    units = -(-outs // _BLOCK_ROWS)  # a tile, for silu_mul one of each half
    blocks = min(device.sms, units)
    step = tuning.steps[rows_of_x > 1]
    levels = 2 if normed and constants.get("U") == "f32" else 1
    sizes = _Sizes(rows_of_x, parts, -(-units // blocks), (2 * levels if normed else 0) if tensor else 4, step)
    room = device.shared - _RESERVED_BYTES
    packing = weight.format.packing
    each = 16 * levels + (2 * packing.groups if {"offset", "super_least"} & dict(packing.parts).keys() else 0)
    most = _MAX_REGISTERS[rows_of_x > 1]
    divisions = tuple(d for d in tuning.divisions if d[1] * each <= most) if tensor else _STAGED_DIVISIONS
    divided = sizes.divide(-(-k // _BLOCK_COLUMNS), packing.block_bytes, divisions, tuning.flight, room)
    if divided is None:
        raise OpError(f"{call.op.name}: {device.shared} bytes of shared memory are too few for {weight.format.name}")
    slices, depth = divided
    shared = depth * slices.warps * slices.blocks * packing.block_bytes + sizes.bytes(slices)
    return Launch(
        f"linear_packed.cu:{kernel}_packed",
        (blocks,),
        (32 * slices.warps,),
        max(shared, device.shared // 2) if tuning.alone else shared,
        constants={
            **constants,
            "W": packing.type,
            "ROWS": rows_of_x,
            "WARPS": slices.warps,
            "BLOCKS": slices.blocks,
            "PHASES": slices.phases,
            "DEPTH": depth,
            "STEP": step,
            "ORDERED": weight.order is not None,
            "first": first,
            "rows": outs,
            "column": column,
        },
        names={"w": f"w.{number}", "order": f"w.{number}.order"},
    )


def plan_packed(
    kernel: str,
    call: Call,
    device: Device,
    segments: Sequence[SegmentLike],
    constants: Mapping[str, Any],
    tuning: Tuning = TUNING,
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
            launch = _launch(kernel, call, device, first, (i, segment), column, constants, tuning)
            launches.append(replace(launch, names={**launch.names, "y": _PRODUCTS}) if apart else launch)
            column += segment.rows
    if not apart:
        return Plan(tuple(launches))
    grid = (n, -(-m // (8 * _ACTIVATION_THREADS)))
    names = {"x": _PRODUCTS}
    launches.append(Launch("activation.cu:silu_mul", grid, (_ACTIVATION_THREADS,), constants={"f": m}, names=names))
    return Plan(tuple(launches), {_PRODUCTS: ((n, 2 * m), dtype_name(call.dtypes["T"]))})
