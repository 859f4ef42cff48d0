"""A packed weight: blocks of 16 rows by 128 columns, as kernels read them, in pieces of 16 bytes.

Lane l = 4 r + t of a warp has the codes of rows r and r + 8 of a block, and of each 16 columns those at 4 t .. 4 t + 3:
the shares of the tensor cores' mma.m16n8k16, but for the order of the sum, which is free. A block begins with the
codes, every lane's vectors of 16 bytes one after the other (vector v of lane l is number 32 v + l);
cuda_src/formats.cuh takes them apart. What goes with them follows, part by part: [groups][8 r][rows r and r + 8]. Rows
and columns beyond the matrix are zero bytes: numbers that are finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .fields import Field, element_plane
from .format import BLOCK_COLUMNS, BLOCK_ROWS, PART_DTYPES, Packing
from .stored import ExpertStack, Segment, Stack, Stored

__all__ = ["Packed", "lane_codes", "pack", "packed"]


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight [m, k], on whatever device its segments are; they lie one below the other. Of experts [E, m, k]:
    one segment with the rows of each, up to a whole number of blocks."""

    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What a plan depends on."""
        return self.shape, *((s.rows, s.format, s.order is None) for s in self.segments)


def packed(weight: Stored | Stack | ExpertStack | Packed) -> Packed:
    """A weight packed in host memory: a matrix is one segment, a stack one for each part; what is packed stays so."""
    if isinstance(weight, Packed):
        return weight
    if isinstance(weight, ExpertStack):
        whole = _joined(weight.matrices)
        return Packed(weight.shape, (Segment(len(whole), whole.format, pack(whole)),))
    parts = weight.parts if isinstance(weight, Stack) else (weight,)
    return Packed(weight.shape, tuple(Segment(p.shape[0], p.format, pack(p), p.order) for p in parts))


def pack(stored: Stored) -> np.ndarray[Any, Any]:
    """The blocks of a matrix, uint8: what kernels read."""
    packing, (m, k) = stored.format.packing, stored.shape
    assert packing is not None
    rows, columns = -(-m // BLOCK_ROWS), -(-k // BLOCK_COLUMNS)
    out = np.zeros(packing.nbytes(m, k), np.uint8)
    blocks = out[: rows * columns * packing.block_bytes].reshape(rows, columns, packing.block_bytes)
    codes = _padded(stored.fields["code"].read(), rows * BLOCK_ROWS, columns * BLOCK_COLUMNS)
    blocks[:, :, : packing.code_bytes] = lane_codes(codes, packing)
    for part, dtype in packing.parts:
        bits = stored.fields[part].read()
        if not packing.group:
            scales = _padded(bits, rows * BLOCK_ROWS, 1).astype(np.uint32)
            out[blocks.size :] = scales.reshape(-1).view(np.uint8)
            continue
        each = packing.count(part)
        values = _padded(bits, rows * BLOCK_ROWS, columns * each).astype(f"u{PART_DTYPES[dtype].itemsize}")
        # [row block, half, 8, column block, group] -> [row block, column block, group, 8, half]
        pairs = values.reshape(rows, 2, 8, columns, each).transpose(0, 3, 4, 2, 1)
        at = packing.offset(part)
        size = BLOCK_ROWS * each * values.itemsize
        blocks[:, :, at : at + size] = np.ascontiguousarray(pairs).view(np.uint8).reshape(rows, columns, size)
    return out


def _joined(matrices: Sequence[Stored]) -> Stored:
    """Matrices of one format, one below the other, as one in memory."""
    first = matrices[0]
    fields = {}
    for name, field in first.fields.items():
        bits = np.concatenate([m.fields[name].read() for m in matrices])
        fields[name] = Field((element_plane(bits.astype(f"u{max(8, field.bits) // 8}")),))
    return Stored((sum(map(len, matrices)), first.shape[1]), first.format, fields, sum(m.nbytes for m in matrices))


def _padded(values: np.ndarray[Any, Any], rows: int, columns: int) -> np.ndarray[Any, Any]:
    found = np.zeros((rows, columns), np.uint32)
    found[: values.shape[0], : values.shape[1]] = values
    return found


def lane_codes(codes: np.ndarray[Any, Any], packing: Packing) -> np.ndarray[Any, Any]:
    """The codes uint32 [rows, columns] of whole blocks as uint8 [row block, column block, code bytes].

    Of a chunk of 16 columns a lane has eight, in the four registers of an mma's A: (row r; columns 4 t + 0, 1),
    (r + 8; 0, 1), (r; 2, 3), (r + 8; 2, 3).

    - 4 bits: a word, with bits 4 i of register i's first code and bits 16 + 4 i of its second. What 5 or 6 bits have
      more follows in vectors of their own, see ``_high``.
    - 8 bits: a word for row r, one for r + 8; their bytes are the columns 0, 2, 1, 3.
    - 16 bits: a word for each register. 32 bits: the four columns of row r, then those of r + 8.
    """
    rows, columns = codes.shape[0] // BLOCK_ROWS, codes.shape[1] // BLOCK_COLUMNS
    # [row block, half, r, column block, chunk, t, pair, element] -> [rb, cb, chunk, r, t, pair, half, element]
    lanes = codes.reshape(rows, 2, 8, columns, 8, 4, 2, 2).transpose(0, 3, 4, 2, 5, 6, 1, 7)
    lanes = lanes.reshape(rows, columns, 8, 32, 4, 2)  # [.., chunk, lane, register, element]
    bits = packing.code.bits
    if bits <= 6:
        low = _nibbles(lanes & 15)
        found = [_vectors(low[..., None])]
        if bits > 4:
            found.append(_high(lanes >> 4, bits - 4))
        return np.concatenate(found, -1)
    if bits == 8:
        register = lanes.astype(np.uint32)
        words = np.stack([_row_bytes(register[..., half, :], register[..., 2 + half, :]) for half in (0, 1)], -1)
    elif bits == 16:
        words = lanes[..., 0] | lanes[..., 1] << np.uint32(16)
    else:
        words = lanes.reshape(*lanes.shape[:4], 2, 2, 2).transpose(0, 1, 2, 3, 5, 4, 6).reshape(*lanes.shape[:4], 8)
    return _vectors(words)


def _nibbles(lanes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[.., register, element] of 4 bits -> one word."""
    shifts = (4 * np.arange(4, dtype=np.uint32))[:, None] + np.array([0, 16], np.uint32)
    found: np.ndarray[Any, Any] = (lanes << shifts).sum((-1, -2), dtype=np.uint32)
    return found


def _row_bytes(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Columns (0, 1) and (2, 3) of a row -> a word with the bytes of the columns 0, 2, 1, 3."""
    columns = (first[..., 0], second[..., 0], first[..., 1], second[..., 1])
    return np.asarray(sum(c << np.uint32(8 * i) for i, c in enumerate(columns)), np.uint32)


def _vectors(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Words [rb, cb, chunk, lane, words of a chunk] -> bytes [rb, cb, ..], vectors of four words by lanes."""
    rows, columns, chunks, lanes, each = words.shape
    by_lane = words.transpose(0, 1, 3, 2, 4).reshape(rows, columns, lanes, chunks * each // 4, 4)
    ordered = np.ascontiguousarray(by_lane.transpose(0, 1, 3, 2, 4).astype(np.uint32))
    return ordered.view(np.uint8).reshape(rows, columns, -1)


def _high(lanes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The bits above the fourth, 1 or 2 of each code [rb, cb, chunk, lane, register, element].

    2 bits: word j of a lane has the chunks 2 j and 2 j + 1, at bits 8 (chunk % 2) + 2 register + 16 element; a lane has
    a vector. 1 bit: word j has the chunks 4 j .. 4 j + 3, at bits 4 (chunk % 4) + register + 16 element; a lane has two
    words, lane after lane.
    """
    rows, columns = lanes.shape[:2]
    each = 2 // bits * 2  # chunks of a word
    shifts = bits * np.arange(4, dtype=np.uint32)[:, None] + np.array([0, 16], np.uint32)
    chunk = (lanes << shifts).sum((-1, -2), dtype=np.uint32)  # [rb, cb, chunk, lane]
    grouped = chunk.reshape(rows, columns, 8 // each, each, 32)
    words = (grouped << (4 * bits * np.arange(each, dtype=np.uint32))[:, None]).sum(3, dtype=np.uint32)
    ordered = np.ascontiguousarray(words.transpose(0, 1, 3, 2).astype(np.uint32))  # [rb, cb, lane, word]
    return ordered.view(np.uint8).reshape(rows, columns, -1)
