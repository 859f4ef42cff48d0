"""Products of a few rows with a packed weight. Kernels: cuda_src/linear_packed.cu; ``quant/packed.py`` says what a
packed weight is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..dtypes import dtype_name
from .launch import Device, Launch, Plan
from .norm import MAX_NORM_ELEMENTS, row_launch
from .op import Call
from .signature import OpError
from .weights import SegmentLike

__all__ = [
    "MAX_FEW_ROWS",
    "ROWS",
    "TUNING",
    "Sizes",
    "Tuning",
    "block_sums",
    "halves_of",
    "plan_packed",
    "staged_tuning",
]

MAX_FEW_ROWS = 8
"""Rows of x that one launch takes."""

ROWS = (1, 2, 4, 8)
"""Rows of x that a kernel may be compiled for."""

_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 128  # of a packed block
_RESERVED_BYTES = 5 << 10  # of shared memory: the kernels' static arrays, and what the driver keeps for itself


@dataclass(frozen=True)
class Tuning:
    """What decides how fast the kernels are.

    warps: of a GPU block, at most, for one row of x and for several; fewer where shared memory is short. ahead: packed
    blocks that a warp has asked for ahead of the one that it multiplies; behind: further ones, which it asks for only
    behind x where x is short, so that x does not wait for them. steps: units of tiles between two barriers, for one row
    of x and for several. part: bytes of x that a GPU block should take, at most: several blocks share k if there are
    more, unless the kernel computes a norm. norm_rows: rows of x up to which it does that itself; for more a launch
    before it does, and the product asks for its weights meanwhile.
    """

    warps: tuple[int, int] = (16, 16)
    ahead: int = 2
    behind: int = 1
    steps: tuple[int, int] = (4, 1)
    part: int = 160 << 10
    norm_rows: int = 2


TUNING = Tuning()
_STAGED_WARPS = 8  # at most, without tensor cores
_MAX_PHASES = 16
_MAX_SPLIT = 8  # GPU blocks that share k
_MIN_DEPTH = 2  # blocks in a warp's ring
_SHORT_BYTES = 64 << 10  # of x in a GPU block: for more, what is asked for behind it comes late
_PRODUCTS = "products"  # scratch: what a gated activation takes, where it is a launch of its own
_PARTS, _ARRIVALS = "parts", "arrivals"  # scratch: sums of GPU blocks that share k, and how many have left theirs
_NORMED = "normed"  # scratch: rows behind a norm, where that is a launch of its own
_ACTIVATION_THREADS = 128


@dataclass(frozen=True)
class _Shape:
    """How the warps of a GPU block divide a row of blocks: slices of ``blocks`` for each warp in each phase."""

    warps: int
    blocks: int
    phases: int


def _shape(columns: int, most: int, phases: int) -> _Shape:
    """columns: packed blocks of a row of blocks; most: warps. Equal slices."""
    each = -(-columns // (most * phases))
    warps = min(most, -(-columns // (each * phases)))
    return _Shape(warps, each, -(-columns // (warps * each)))


@dataclass(frozen=True)
class Sizes:
    """What the shared memory of a GPU block holds.

    rows: of x; parts: tiles of a unit; units: of a GPU block, at most; element: bytes of one of x; sums: of a row of x
    in a packed block, for offsets; step: units between two barriers;
    split: GPU blocks that share k.
    """

    rows: int
    parts: int
    units: int
    element: int
    sums: int
    step: int
    split: int

    def bytes(self, s: _Shape) -> int:
        """Bytes beside the ring."""
        unit = _BLOCK_ROWS * self.rows * 4 * self.parts
        sums = 2 * s.warps * self.step * unit + (self.units * unit if s.phases > 1 or self.split > 1 else 0)
        blocks = s.warps * s.blocks
        return sums + self.rows * (self.element * (blocks * _BLOCK_COLUMNS + 32) + 4 * self.sums * blocks)

    def divide(self, columns: int, block_bytes: int, tuning: Tuning, device: Device) -> tuple[_Shape, int, int] | None:
        """The division of rows of blocks that leaves room for a ring, the blocks that a warp has there, and those that
        it asks for first: in as few phases as possible, but rather that than fewer than 16 warps."""
        limit = device.shared - _RESERVED_BYTES
        most = tuning.warps[self.rows > 1]
        some = [most, *(warps for warps in (16, 8, 4, 2, 1) if warps < most)]
        tried = [warps for warps in some if warps >= min(most, 16)], some
        for phases, warps in (pair for which in tried for pair in product(range(1, _MAX_PHASES + 1), which)):
            s = _shape(-(-columns // self.split), warps, phases)
            slot = s.warps * block_bytes
            short = self.rows * self.element * s.warps * s.blocks * s.phases * _BLOCK_COLUMNS <= _SHORT_BYTES
            wanted = tuning.ahead + 1 + tuning.behind * short
            depth = min(wanted, (limit - self.bytes(s)) // slot)
            if depth >= _MIN_DEPTH:
                return s, depth, min(tuning.ahead, depth - 1)
        return None


def block_sums(packing: Any) -> int:
    """Sums of a row of x that the kernels need for the columns of a packed block: one for each group with an offset."""
    return int(packing.groups) if {"offset", "super_least"} & dict(packing.parts).keys() else 0


def staged_tuning(tuning: Tuning = TUNING) -> Tuning:
    """That of kernels without tensor cores."""
    return replace(tuning, warps=(_STAGED_WARPS, _STAGED_WARPS))


def _split(x_bytes: int, part: int, device: Device) -> int:
    """GPU blocks that share k: a power of two, of which many fit the multiprocessors."""
    split = 1
    while x_bytes > part * split and 2 * split <= min(_MAX_SPLIT, device.sms):
        split *= 2
    return split


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
    n, k, tensor, normed = call["n"], call["k"], _tensor(call, device), "norm" in kernel
    parts = halves_of(constants)
    wanted = MAX_FEW_ROWS if device.deterministic else min(n - first, MAX_FEW_ROWS)
    rows_of_x = next(rows for rows in ROWS if rows >= wanted)
    outs = weight.rows // parts  # columns of y
    units = -(-outs // _BLOCK_ROWS)  # a tile, if gated one of each half
    step = tuning.steps[rows_of_x > 1]
    levels = 2 if normed and constants.get("U") == "f32" else 1
    packing = weight.format.packing
    split = _split(2 * rows_of_x * k, min(tuning.part, device.shared * 5 // 8), device) if tensor and not normed else 1
    groups = min(device.sms // split, units)
    sizes = Sizes(rows_of_x, parts, -(-units // groups), 2 * levels if tensor else 4, block_sums(packing), step, split)
    if not tensor:
        tuning = staged_tuning(tuning)
    divided = sizes.divide(-(-k // _BLOCK_COLUMNS), packing.block_bytes, tuning, device)
    if divided is None:
        raise OpError(f"{call.op.name}: {device.shared} bytes of shared memory are too few for {weight.format.name}")
    shape, depth, early = divided
    shared = depth * shape.warps * packing.block_bytes + sizes.bytes(shape)
    # Two GPU blocks do not fit a multiprocessor, so those of the next kernel are dealt out evenly.
    shared = max(shared, device.shared // 2)
    return Launch(
        f"linear_packed.cu:{kernel}_packed",
        (groups * split,),
        (32 * shape.warps,),
        shared,
        constants={
            "ACT": "NO_ACT",
            **constants,
            "W": packing.type,
            "ROWS": rows_of_x,
            "WARPS": shape.warps,
            "BLOCKS": shape.blocks,
            "PHASES": shape.phases,
            "DEPTH": depth,
            "EARLY": early,
            "STEP": step,
            **({} if normed else {"SPLIT": split}),
            "ORDERED": weight.order is not None,
            "first": first,
            "rows": outs,
            "column": column,
        },
        names={"w": f"w.{number}", "order": f"w.{number}.order"},
    )


def _parts(launch: Launch) -> int:
    """Sums that the GPU blocks of a launch leave for each other."""
    of = launch.constants
    return int(of["SPLIT"] * -(-of["rows"] // _BLOCK_ROWS) * halves_of(of) * _BLOCK_ROWS * of["ROWS"])


def halves_of(constants: Mapping[str, Any]) -> int:
    """Rows of w that make a column of y, by the constants of a launch: two where the activation ``ACT`` is gated."""
    return 2 if constants.get("ACT", "").endswith("_MUL") else 1


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
    A gated activation whose halves do not begin with a packed block, or that has several segments, is a launch of its
    own behind a product into scratch.
    """
    n, m, T = call["n"], call["m"], dtype_name(call.dtypes["T"])
    launches = []
    scratch: dict[str, tuple[tuple[int, ...], str]] = {}
    names = {}
    if normed := _norm(kernel, call, constants, tuning):
        launches.append(normed)
        scratch[_NORMED] = ((n, call["k"]), T)
        names["x"] = _NORMED
        kernel = "linear"
    apart = halves_of(constants) > 1 and (m % _BLOCK_ROWS != 0 or len(segments) > 1)
    activation = constants.get("ACT", "").lower()
    if apart:
        constants = {**constants, "ACT": "NO_ACT", "m": 2 * m}
        scratch[_PRODUCTS] = ((n, 2 * m), T)
        names["y"] = _PRODUCTS
    for first in range(0, n, MAX_FEW_ROWS):
        column = 0
        for i, segment in enumerate(segments):
            launch = _launch(kernel, call, device, first, (i, segment), column, constants, tuning)
            launches.append(replace(launch, names={**launch.names, **names}))
            column += segment.rows
    if "norm" not in kernel:
        shared = [launch for launch in launches if launch.constants.get("SPLIT", 1) > 1]
        scratch[_PARTS] = ((max((_parts(launch) for launch in shared), default=1),), "f32")
        scratch[_ARRIVALS] = ((max((launch.grid[0] for launch in shared), default=1),), "u32")
    if apart:
        grid = (n, -(-m // (8 * _ACTIVATION_THREADS)))
        constants = {"f": m}
        kernel, names = f"activation.cu:{activation}", {"x": _PRODUCTS}
        launches.append(Launch(kernel, grid, (_ACTIVATION_THREADS,), 0, constants, names))
    return Plan(tuple(launches), scratch, frozenset({_ARRIVALS} & scratch.keys()))


def _norm(kernel: str, call: Call, constants: Mapping[str, Any], tuning: Tuning) -> Launch | None:
    """The launch of the norm of a kernel that begins with one, if there are so many rows that it is one of its own. It
    rounds to T, so sums in float32 are not for it."""
    n, k = call["n"], call["k"]
    name = kernel.removesuffix("_linear")
    if name == kernel or n <= tuning.norm_rows or constants.get("U") == "f32" or k > MAX_NORM_ELEMENTS:
        return None
    launch = row_launch(name, n, k)
    names = {"w": "g", "y": _NORMED, **({"b": "h"} if "h" in call.arrays else {})}
    return replace(launch, constants={**launch.constants, "d": k}, names=names)
