"""Weights on their way from mapped files to the GPU: converted, or, if they are quantised, packed there.

Those that are to be quantised on the way are another file's: rounding.py.

The bytes of a quantised weight go to the GPU as they lie in the file, and with them, in the same buffer, tables that
say where each number lies. The kernels of cuda_src/pack.cu gather from that buffer; it is kept for the next weight.
Nothing waits for anything: all of it is queued, in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...dtypes import Array
from ...errors import CheckpointError
from ...quant.fields import Field, Plane
from ...quant.format import BLOCK_COLUMNS, BLOCK_ROWS, PART_DTYPES, Packing, plain_format
from ...quant.packed import Packed
from ...quant.rtn import Rounded
from ...quant.stored import Segment, Stored, expert_stack
from ...quant.weight import Weight, as_stored
from .gpu import Gpu
from .rounding import RoundingJob

__all__ = ["Job", "Loading", "convert", "pack_kernels"]

_FILE = "pack.cu"
_WARPS = 8  # of a thread block of pack_codes: each writes a block
_THREADS = 256  # of a thread block of pack_part: each writes a number
_ALIGNMENT = 16  # bytes: where the pieces of the buffer begin


def convert(chunk: np.ndarray[Any, Any], dtype: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    """A chunk of a weight in another dtype. Raises CheckpointError if float16 cannot hold a finite value of it."""
    if chunk.dtype == dtype:
        return chunk
    chunk = plain_format(chunk.dtype).decode(chunk)
    with np.errstate(over="ignore"):
        out = chunk.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(out).all() and np.isfinite(chunk).all():
        largest = float(np.abs(chunk).max())
        raise CheckpointError(f"weight {name} holds {largest:g}, which float16 cannot; --dtype float32 can")
    return out


def pack_kernels() -> Iterator[tuple[str, str]]:
    """(file, C++ name) of every kernel instance that may pack a weight."""
    yield from ((_FILE, f"pack_codes<{bits}>") for bits in (4, 5, 6, 8, 16, 32))
    yield from ((_FILE, f"pack_part<{size}>") for size in (1, 2, 4))


class Loading:
    """Packs quantised weights on a GPU. dtype: of plain parts of a weight that has quantised ones."""

    def __init__(self, gpu: Gpu, dtype: np.dtype[Any]) -> None:
        self._gpu, self._dtype = gpu, dtype
        self._raw: Array | None = None

    def pack(self, weight: Weight) -> Packed:
        """Queue the packing of a weight whose parts lie one below the other; rows of one format are a segment.

        Raises CheckpointError naming a plain part whose values float16 cannot hold.
        """
        stored: Sequence[Stored]
        stored = [p if isinstance(p, Stored) else self._plain(p, weight.name) for p in weight.parts]
        if weight.experts:
            stored = expert_stack(stored, weight.experts).matrices
        return Packed(weight.shape, tuple(self._segment(stack) for stack in _alike(stored)))

    def _plain(self, array: np.ndarray[Any, Any], name: str) -> Stored:
        return as_stored(convert(np.ascontiguousarray(array), self._dtype, name), self._dtype)

    def _segment(self, stack: Sequence[Stored]) -> Segment:
        gpu = self._gpu
        plain = [s for s in stack if isinstance(s, Rounded)]
        job: Job | RoundingJob = RoundingJob(plain) if plain else Job(stack)
        raw = self._buffer(job.layout.size)
        gpu.stage_pieces(raw, job.layout.pieces)
        blocks = gpu.empty((job.nbytes,), np.dtype(np.uint8))
        job.queue(gpu, raw, blocks)
        order = stack[0].order
        if order is not None:
            host, order = order, gpu.empty(order.shape, np.dtype(np.int32))
            gpu.stage(order, 0, np.ascontiguousarray(host, np.int32))
        return Segment(job.m, stack[0].format, blocks, order)

    def _buffer(self, size: int) -> Array:
        """Bytes on the GPU for what is packed next: those of the weight before, if they are enough."""
        if self._raw is None or self._raw.nbytes < size:
            self._raw = None  # before the new one is there
            self._raw = self._gpu.empty((size,), np.dtype(np.uint8))
        return self._raw


class Job:
    """The packing of parts of one format, one below the other: [m, k] in all.

    layout: what the buffer of raw bytes holds; nbytes: of the blocks that are written.
    """

    def __init__(self, stack: Sequence[Stored]) -> None:
        first = stack[0]
        assert first.format.packing is not None
        self.packing, self.m, self.k = first.format.packing, sum(len(s) for s in stack), first.shape[1]
        self.nbytes = self.packing.nbytes(self.m, self.k)
        self.layout = layout = _Layout()
        places = layout.add_planes([p for s in stack for f in s.fields.values() for p in f.planes])
        part = layout.add(np.repeat(np.arange(len(stack), dtype=np.int32), [len(s) for s in stack]))
        names = ("code", *dict(self.packing.parts))
        self._fields = {name: _arguments([s.fields[name] for s in stack], part, places, layout) for name in names}

    def queue(self, gpu: Gpu, raw: Array, blocks: Array) -> None:
        """Launch the kernels. raw: holds what ``layout`` says; blocks: uint8 [nbytes], all of which they write."""
        packing, tall, wide = self.packing, -(-self.m // BLOCK_ROWS), -(-self.k // BLOCK_COLUMNS)
        codes = gpu.function(_FILE, f"pack_codes<{packing.code.bits}>", 0)
        arguments = (blocks, raw, *self._fields["code"], np.int32(packing.block_bytes))
        codes((-(-tall // _WARPS), wide, 1), (32 * _WARPS, 1, 1), arguments, 0)
        for name, dtype in packing.parts:
            part = gpu.function(_FILE, f"pack_part<{PART_DTYPES[dtype].itemsize}>", 0)
            count, place = _place(packing, name, tall, wide)
            part((-(-count // _THREADS), 1, 1), (_THREADS, 1, 1), (blocks, raw, *self._fields[name], *place), 0)


# ---- the buffer ------------------------------------------------------------------------------------------------------
@dataclass
class _Layout:
    """What goes to the GPU in one buffer. pieces: (offset, bytes), one behind the other; size: of it all, in bytes."""

    pieces: list[tuple[int, np.ndarray[Any, Any]]] = field(default_factory=list)
    size: int = 0

    def add(self, array: np.ndarray[Any, Any]) -> int:
        """The offset of a contiguous array."""
        offset = self.size
        data = array.reshape(-1).view(np.uint8)
        self.pieces.append((offset, data))
        self.size = -(-(offset + data.size) // _ALIGNMENT) * _ALIGNMENT
        return offset

    def add_planes(self, planes: Sequence[Plane]) -> dict[int, int]:
        """The bytes that the planes point into, each tensor once and only what is needed of it.

        Returns, for the id of each plane, what is to be added to the bits of its table of rows.
        """
        hulls: dict[tuple[int, int], list[int]] = {}
        data: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        keys = []
        for plane in planes:
            key = plane.data.__array_interface__["data"][0], plane.data.size
            keys.append(key)
            data[key] = plane.data
            if not (len(plane.rows) and len(plane.columns)):
                continue
            low = int(plane.rows.min() + plane.columns.min()) // 8
            high = (int(plane.rows.max() + plane.columns.max()) + plane.bits + 7) // 8
            hull = hulls.setdefault(key, [low, high])
            hull[:] = min(hull[0], low), max(hull[1], high)
        bases = {key: self.add(data[key][low:high]) - low for key, (low, high) in hulls.items()}
        return {id(plane): 8 * bases.get(key, 0) for plane, key in zip(planes, keys, strict=True)}


def _arguments(fields: Sequence[Field], part: int, places: dict[int, int], layout: _Layout) -> tuple[Any, ...]:
    """A field of a stack as the kernels take it; its tables go to the buffer."""
    first, planes = fields[0], range(len(fields[0].planes))
    rows = [[f.planes[i].rows + places[id(f.planes[i])] for f in fields] for i in planes]
    columns = np.array([[f.planes[i].columns for f in fields] for i in planes], np.int64)
    widths = sum(plane.bits << 8 * i for i, plane in enumerate(first.planes))
    m, k = sum(f.shape[0] for f in fields), first.shape[1]
    at = layout.add(np.array([np.concatenate(r) for r in rows], np.int64)), layout.add(columns), part
    return (*map(np.int64, at), *map(np.uint32, (widths, first.flip, first.add)), *map(np.int32, (m, k, len(fields))))


def _place(packing: Packing, part: str, tall: int, wide: int) -> tuple[int, tuple[Any, ...]]:
    """How many numbers of a part there are in ``tall`` by ``wide`` blocks, and the last arguments of pack_part."""
    if not packing.group:  # one for each row, behind the last block
        behind = np.int64(tall * wide * packing.block_bytes)
        return tall * BLOCK_ROWS, (behind, *map(np.int32, (4 * BLOCK_ROWS, 1, 1, False)))
    each = packing.count(part)
    numbers = packing.block_bytes, each, wide, True
    return tall * wide * BLOCK_ROWS * each, (np.int64(packing.offset(part)), *map(np.int32, numbers))


# ---- segments --------------------------------------------------------------------------------------------------------
def _alike(parts: Sequence[Stored]) -> list[list[Stored]]:
    """Parts one below the other that can be packed together: of one format, one order, and planes of equal widths."""
    runs: list[list[Stored]] = []
    for part in parts:
        if runs and _kind(runs[-1][0]) == _kind(part) and _same_order(runs[-1][0].order, part.order):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _kind(stored: Stored) -> tuple[Any, ...]:
    if isinstance(stored, Rounded):  # to ask for its fields would be to quantise it
        return stored.format, "rounded"
    fields = ((name, f.flip, f.add, *(p.bits for p in f.planes)) for name, f in sorted(stored.fields.items()))
    return stored.format, *fields


def _same_order(a: np.ndarray[Any, Any] | None, b: np.ndarray[Any, Any] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
