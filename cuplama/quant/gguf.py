"""GGUF's tensor types as plain views and as formats: where in a block each code, scale and minimum lies.

The blocks are those of ggml (ggml-org/ggml, src/ggml-common.h); they run along a row, and a row's blocks lie together.
Of the K types a block of 256 elements has a float16 scale, and for each 32 (Q6_K: 16) elements a whole number that is
multiplied by it; Q4_K and Q5_K have the same once more for what is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ..dtypes import DTYPES
from ..errors import CheckpointError
from ..gguf import TENSOR_TYPES, GGUFTensor
from .fields import Field, Plane
from .format import BLOCK_COLUMNS, Format, grouped, nested, whole
from .stored import Stored

__all__ = ["GGUF_FORMATS", "GGUF_PLAIN", "PermutedRows", "tensor_data"]

_Bits = np.ndarray[Any, np.dtype[np.int64]]
_SUPER = 256  # elements of a block of a K type
GGUF_PLAIN: Mapping[str, np.dtype[Any]] = {"F32": DTYPES["f32"], "F16": DTYPES["f16"], "BF16": DTYPES["bf16"]}
"""The types that have one number an element."""


def _bytes_from(start: int, count: int) -> _Bits:
    """The places, in bits, of ``count`` bytes one after the other."""
    return 8 * (start + np.arange(count, dtype=np.int64))


def _halves(start: int, count: int) -> _Bits:
    """4 bits an element: of ``count`` bytes first the low halves, then the high ones."""
    low = _bytes_from(start, count)
    return np.concatenate([low, low + 4])


def _chunked(start: int, chunk: int) -> _Bits:
    """4 bits an element of a K block, 128 bytes: the low halves of ``chunk`` bytes, their high halves, and so on."""
    return np.concatenate([_halves(start + at, chunk) for at in range(0, _SUPER // 2, chunk)])


@dataclass(frozen=True)
class _Layout:
    """A quantised type.

    planes: field -> of each of its planes (bits, the place of each number in a block, in bits), the lowest first;
    flips: field -> bits that are turned over.
    """

    format: Format
    planes: Mapping[str, tuple[tuple[int, _Bits], ...]]
    flips: Mapping[str, int] = field(default_factory=dict)


def _at(byte: int) -> tuple[tuple[int, _Bits], ...]:
    """A float16."""
    return ((16, np.array([8 * byte], np.int64)),)


def _super(byte: int) -> tuple[tuple[int, _Bits], ...]:
    """A float16 that stands for all of a K block: a field has it for each ``BLOCK_COLUMNS`` columns."""
    return ((16, np.full(_SUPER // BLOCK_COLUMNS, 8 * byte, np.int64)),)


def _sixes(start: int) -> Mapping[str, tuple[tuple[int, _Bits], ...]]:
    """Eight scales and eight minima of 6 bits in 12 bytes. The first four of each are the low bits of a byte; of the
    others four bits lie in the last four bytes, and two in the bytes of the first ones."""
    byte = _bytes_from(start, 12)
    scales, minima, others = byte[:4], byte[4:8], byte[8:]

    def both(*places: _Bits) -> _Bits:
        return np.concatenate(places)

    return {
        "sub_scale": ((4, both(scales, others)), (2, both(scales + 4, scales + 6))),
        "sub_least": ((4, both(minima, others + 4)), (2, both(minima + 4, minima + 6))),
    }


def _sixteenths() -> tuple[tuple[int, _Bits], ...]:
    """Q6_K's codes: for each 128 elements 64 bytes of low halves, 32 elements from each, and 32 bytes of the two bits
    above: those of elements 32 apart are neighbours."""
    low, high = [], []
    for half in (0, 1):
        bytes_ = _bytes_from(64 * half, 64)
        low += [bytes_, bytes_ + 4]
        high += [_bytes_from(128 + 32 * half, 32) + 2 * i for i in range(4)]
    return (4, np.concatenate(low)), (2, np.concatenate(high))


_ONES = np.arange(32, dtype=np.int64)  # a bit for each element of a block of 32, in order
_FIFTHS = np.concatenate(
    [_bytes_from(16, 32) + i for i in range(8)]
)  # Q5_K's: those of elements 32 apart are neighbours

_LAYOUTS: Mapping[str, _Layout] = {
    layout.format.name: layout
    for layout in (
        _Layout(grouped("Q4_0", whole(4, 8), 32, "f16"), {"code": ((4, _halves(2, 16)),), "scale": _at(0)}),
        _Layout(
            grouped("Q4_1", whole(4), 32, "f16", offset=True),
            {"code": ((4, _halves(4, 16)),), "scale": _at(0), "offset": _at(2)},
        ),
        _Layout(
            grouped("Q5_0", whole(5, 16), 32, "f16"),
            {"code": ((4, _halves(6, 16)), (1, 8 * 2 + _ONES)), "scale": _at(0)},
        ),
        _Layout(
            grouped("Q5_1", whole(5), 32, "f16", offset=True),
            {"code": ((4, _halves(8, 16)), (1, 8 * 4 + _ONES)), "scale": _at(0), "offset": _at(2)},
        ),
        _Layout(
            grouped("Q8_0", whole(8, 128), 32, "f16"),
            {"code": ((8, _bytes_from(2, 32)),), "scale": _at(0)},
            {"code": 0x80},
        ),
        _Layout(
            nested("Q4_K", whole(4), 32, "u8", least=True),
            {"code": ((4, _chunked(16, 32)),), "super_scale": _super(0), "super_least": _super(2), **_sixes(4)},
        ),
        _Layout(
            nested("Q5_K", whole(5), 32, "u8", least=True),
            {
                "code": ((4, _chunked(48, 32)), (1, _FIFTHS)),
                "super_scale": _super(0),
                "super_least": _super(2),
                **_sixes(4),
            },
        ),
        _Layout(
            nested("Q6_K", whole(6, 32), 16, "i8", least=False),
            {"code": _sixteenths(), "sub_scale": ((8, _bytes_from(192, 16)),), "super_scale": _super(208)},
        ),
    )
}
_BLOCKS = {kind.name: (kind.block, kind.nbytes) for kind in TENSOR_TYPES.values()}
GGUF_FORMATS: Mapping[str, Format] = {name: layout.format for name, layout in _LAYOUTS.items()}
"""Those that are blocks of codes and scales, by type."""


class PermutedRows:
    """Rows of a plain tensor in another order, array-like: what is asked for is copied, the rest stays in the file.

    rows: the place in the file of each row.
    """

    def __init__(self, data: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        self._data, self._rows = data, rows
        self.shape, self.dtype, self.nbytes, self.ndim = data.shape, data.dtype, data.nbytes, data.ndim

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, rows: Any) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._data[self._rows[rows]]
        return found

    def astype(self, dtype: Any, copy: bool = True) -> np.ndarray[Any, Any]:
        """All rows in another dtype. They are copied in any case."""
        return self[:].astype(dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self.astype(dtype or self.dtype)


def tensor_data(tensor: GGUFTensor, rows: np.ndarray[Any, Any] | None = None) -> Any:
    """What a tensor holds: a view of the file, or a ``Stored`` matrix.

    rows: the place in the file of each row, where that is not its own. Raises CheckpointError for a type that is not
    supported.
    """
    name = tensor.type.name
    if name in GGUF_PLAIN:
        view = tensor.data.view(GGUF_PLAIN[name]).reshape(tensor.shape)
        return view if rows is None else PermutedRows(view, rows)
    layout = _LAYOUTS.get(name)
    if layout is None or len(tensor.shape) != 2:
        what = f"type {name}" if layout is None else f"type {name} and {len(tensor.shape)} dimensions"
        supported = ", ".join((*GGUF_PLAIN, *_LAYOUTS))
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} has {what}; supported: matrices of {supported}")
    m, k = tensor.shape
    places = (np.arange(m, dtype=np.int64) if rows is None else rows) * (
        8 * (k // tensor.type.block) * tensor.type.nbytes
    )
    fields = {
        part: Field(
            tuple(Plane(tensor.data, bits, places, columns) for bits, columns in _columns(name, part, k)),
            layout.flips.get(part, 0),
        )
        for part in layout.planes
    }
    return Stored((m, k), layout.format, fields, tensor.data.nbytes)


@lru_cache(maxsize=256)
def _columns(name: str, part: str, k: int) -> tuple[tuple[int, _Bits], ...]:
    """(bits, the place of each column in a row, in bits) of the planes of a field; the tensors of a file share them."""
    block, nbytes = _BLOCKS[name]
    starts = 8 * nbytes * np.arange(k // block, dtype=np.int64)
    return tuple((bits, (starts[:, None] + places).reshape(-1)) for bits, places in _LAYOUTS[name].planes[part])
