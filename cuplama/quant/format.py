"""A weight's format: how its bits become numbers.

A format is a value of the weight, not of the graph: a node list is the same whatever the weights are stored in. Plain
formats have one number an element. A packed format has a code for each element, and what the codes of a group of
neighbours along a row have in common::

    w = scale * (number(code) - zero) + offset

``number`` is the code's own (a whole number less a constant, an 8-bit float, a place in a table); zero, offset and the
parts of a scale are there or not. cuda_src/formats.cuh has the same once more for kernels, ``Packing.type`` names it
there, and ``quant/packed.py`` writes the blocks that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from ..dtypes import DTYPES, Array, upcast

__all__ = [
    "BLOCK_COLUMNS",
    "BLOCK_ROWS",
    "E2M1",
    "E4M3",
    "NF4",
    "NF4_NUMBERS",
    "PART_DTYPES",
    "PLAIN",
    "PLAIN_CODES",
    "Code",
    "Format",
    "Packing",
    "decode",
    "grouped",
    "nested",
    "plain_code_format",
    "plain_format",
    "whole",
]

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128
"""The elements of a block of a packed weight, [out, in]."""


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    name: as people read it; dtype: of the stored elements, None for a packed format; decode: stored rows [m, ...] to
    their numbers [m, k], in float32; packing: of a packed format, what its blocks hold.
    """

    name: str
    dtype: np.dtype[Any] | None
    decode: Callable[[Any], Array]
    packing: Packing | None = None


def _decode_bf16(bits: Array) -> Array:
    """A bf16 is the upper half of a float32: to shift is much faster than to cast."""
    if not isinstance(bits, np.ndarray):
        return upcast(bits)
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


PLAIN: Mapping[str, Format] = {
    "f32": Format("f32", DTYPES["f32"], upcast),
    "f16": Format("f16", DTYPES["f16"], upcast),
    "bf16": Format("bf16", DTYPES["bf16"], _decode_bf16),
}
"""One number an element, by name."""


def plain_format(dtype: np.dtype[Any]) -> Format:
    """The plain format whose elements have that dtype. Raises ValueError if there is none."""
    for form in PLAIN.values():
        if form.dtype == dtype:
            return form
    raise ValueError(f"no plain weight format stores {np.dtype(dtype)}")


# ---- packed formats --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Code:
    """The code of an element. bits: of it; numbers: float32 [2^bits], what each code stands for, None for codes that
    are floats of a plain format themselves; type: in formats.cuh."""

    name: str
    bits: int
    type: str

    @cached_property
    def numbers(self) -> np.ndarray[Any, Any]:
        return _NUMBERS[self.name.partition("-")[0]](self)


def whole(bits: int, bias: int = 0) -> Code:
    """Whole numbers 0 .. 2^bits - 1, less ``bias``. bits: 4, 5, 6 or 8."""
    return Code(f"int{bits}-{bias}", bits, f"Whole<{bits}, {bias}>")


E4M3 = Code("e4m3", 8, "E4m3")
"""8-bit floats: a sign, 4 bits of exponent, 3 of mantissa; no infinity."""
E2M1 = Code("e2m1", 4, "E2m1")
"""4-bit floats: a sign, 2 bits of exponent, 1 of mantissa; no infinity, no NaN. With scales of 8 bits for groups of 32
they are MXFP4: Open Compute Project, "Microscaling Formats (MX) Specification", version 1.0."""
NF4 = Code("nf4", 4, "Nf4")
"""Quantiles of a normal distribution between -1 and 1: Dettmers et al., "QLoRA", arXiv:2305.14314, appendix E."""
PLAIN_CODES = {name: Code(name, bits, f"Plain<{name}>") for name, bits in (("f16", 16), ("bf16", 16), ("f32", 32))}

NF4_NUMBERS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_NUMBERS: Mapping[str, Callable[[Code], np.ndarray[Any, Any]]] = {
    **{
        f"int{bits}": lambda c: np.arange(1 << c.bits, dtype=np.float32) - np.float32(c.name.partition("-")[2])
        for bits in (4, 5, 6, 8)
    },
    "e4m3": lambda c: np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "e2m1": lambda c: np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32),
    "nf4": lambda c: np.array(NF4_NUMBERS, np.float32),
}


@dataclass(frozen=True)
class Packing:
    """What a block of a packed format holds, 16 rows by 128 columns: the codes, then the parts in this order.

    code: of the elements; group: columns that share a scale: 16, 32, 64 or 128; 0: all of the row, whose scales,
    float32, follow behind the last block. parts: name -> dtype of what the scale is made of, one number for each row
    and group:

    - scale (f16, bf16, f32; e8m0, powers of two), and with it zero (u8) or offset (of the scale's dtype), or neither;
    - or super_scale (f16) and, of the block's own, sub_scale (u8 or i8), whose product is the scale; with them
      super_least (f16) and sub_least (u8), whose product, negative, is the offset, or neither. The super ones are one
      for each row of a block.
    """

    code: Code
    group: int
    parts: tuple[tuple[str, str], ...]

    @property
    def groups(self) -> int:
        """Groups of a row of a block."""
        return BLOCK_COLUMNS // self.group if self.group else 0

    def count(self, part: str) -> int:
        """Numbers of a part in a row of a block."""
        return 0 if not self.group else 1 if part.startswith("super_") else self.groups

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a block."""
        return BLOCK_ROWS * BLOCK_COLUMNS * self.code.bits // 8

    def offset(self, part: str) -> int:
        """Where the numbers of a part begin in a block, in bytes."""
        at = self.code_bytes
        for name, dtype in self.parts:
            if name == part:
                return at
            at += BLOCK_ROWS * self.count(name) * PART_DTYPES[dtype].itemsize
        raise KeyError(part)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        parts = sum(BLOCK_ROWS * self.count(name) * PART_DTYPES[dtype].itemsize for name, dtype in self.parts)
        return self.code_bytes + parts

    def nbytes(self, m: int, k: int) -> int:
        """Bytes of a packed weight [m, k]: whole blocks, and the scales of whole rows."""
        rows, columns = -(-m // BLOCK_ROWS), -(-k // BLOCK_COLUMNS)
        return rows * (columns * self.block_bytes + (0 if self.group else 4 * BLOCK_ROWS))

    @property
    def type(self) -> str:
        """The C++ type of a block, of formats.cuh."""
        dtypes = dict(self.parts)
        if not dtypes:
            return f"Packed<{self.code.type}, Unscaled>"
        if "super_scale" in dtypes:
            least = str("super_least" in dtypes).lower()
            return f"Packed<{self.code.type}, Nested<{self.group}, {dtypes['sub_scale']}, {least}>>"
        zero, offset = (str(name in dtypes).lower() for name in ("zero", "offset"))
        return f"Packed<{self.code.type}, Direct<{self.group}, {dtypes['scale']}, {zero}, {offset}>>"


PART_DTYPES: Mapping[str, np.dtype[Any]] = {
    **{name: DTYPES[name] for name in ("f16", "bf16", "f32")},
    "u8": np.dtype(np.uint8),
    "i8": np.dtype(np.int8),
    "e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


def plain_code_format(dtype: str) -> Format:
    """A packed format whose codes are numbers of a plain one, for parts of a stack that are not quantised."""
    return Format(dtype, None, decode, Packing(PLAIN_CODES[dtype], 128, ()))


def grouped(
    name: str, code: Code, group: int, scale: str = "f32", *, zero: bool = False, offset: bool = False
) -> Format:
    """A format with a scale for each group. zero: and a whole number that is taken off the codes; offset: and a number,
    of the scale's dtype, that is added at the end. group: 0 for whole rows, which have float32 scales and no more."""
    parts = [("scale", scale), *([("zero", "u8")] if zero else []), *([("offset", scale)] if offset else [])]
    return Format(name, None, decode, Packing(code, group, tuple(parts)))


def nested(name: str, code: Code, group: int, sub_scale: str, *, least: bool) -> Format:
    """A format of GGUF's K kind: a float16 for each row of a block, and a whole number for each group."""
    parts = [("super_scale", "f16"), ("sub_scale", sub_scale)]
    parts += [("super_least", "f16"), ("sub_least", "u8")] if least else []
    return Format(name, None, decode, Packing(code, group, tuple(parts)))


def decode(stored: Any) -> np.ndarray[Any, Any]:
    """The numbers of a ``Stored`` matrix, float32 [m, k]."""
    packing: Packing = stored.format.packing
    numbers = _numbers(stored.fields["code"].read(), packing.code)
    if not packing.parts:
        return _in_order(numbers, stored.order)
    parts = {name: _part(stored, name, dtype) for name, dtype in packing.parts}
    for kind, part, sign in (("scale", "scale", 1), ("least", "offset", -1)):
        if f"super_{kind}" in parts:
            inner = parts[f"sub_{kind}"]
            outer = np.repeat(parts[f"super_{kind}"], packing.groups, 1)[:, : inner.shape[1]]
            parts[part] = sign * outer * inner
    width = packing.group or stored.shape[1]
    for combine, part in ((np.subtract, "zero"), (np.multiply, "scale"), (np.add, "offset")):
        if part in parts:
            _by_groups(combine, numbers, parts[part], width)
    return _in_order(numbers, stored.order)


def _numbers(codes: np.ndarray[Any, Any], code: Code) -> np.ndarray[Any, Any]:
    """What codes stand for, float32. Whole numbers are computed: to look them up takes ten times as long."""
    if code.name in PLAIN:
        return _floats(codes, code.name)
    if not code.type.startswith("Whole"):
        return np.asarray(code.numbers[codes])
    found = codes.astype(np.float32)
    found += code.numbers[0]
    return found


def _by_groups(combine: np.ufunc, numbers: np.ndarray[Any, Any], values: np.ndarray[Any, Any], width: int) -> None:
    """numbers = combine(numbers, values), in place, where values have a column for each group of ``width`` columns."""
    m, k = numbers.shape
    if k % width == 0:
        blocks = numbers.reshape(m, k // width, width)
        combine(blocks, values[:, :, None], out=blocks)
    else:
        combine(numbers, np.repeat(values, width, 1)[:, :k], out=numbers)


def _part(stored: Any, name: str, dtype: str) -> np.ndarray[Any, Any]:
    bits, kind = stored.fields[name].read(), PART_DTYPES[dtype]
    if dtype in PLAIN:
        return _floats(bits, dtype)
    return np.asarray(bits.astype(f"u{kind.itemsize}").view(kind).astype(np.float32))


def _floats(bits: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    unsigned = np.dtype(f"u{DTYPES[dtype].itemsize}")
    found: np.ndarray[Any, Any] = PLAIN[dtype].decode(bits.astype(unsigned, copy=False).view(DTYPES[dtype]))
    return found


def _in_order(numbers: np.ndarray[Any, Any], order: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    """The columns where they belong: column j of the stored ones is column order[j] of the weight."""
    if order is None:
        return numbers
    found = np.empty_like(numbers)
    found[:, order] = numbers
    return found
