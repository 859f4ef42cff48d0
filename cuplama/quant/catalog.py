"""Well-known packed formats by name, for test cases, times of kernels, and models on random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .fields import Field, Plane, element_plane
from .format import E2M1, E4M3, NF4, PART_DTYPES, PLAIN_CODES, Format, grouped, plain_code_format, whole
from .gguf import GGUF_FORMATS
from .stored import Stored

__all__ = ["CATALOG", "QUANTISED", "random_stored"]

QUANTISED: Mapping[str, Format] = {
    form.name: form
    for form in (
        grouped("int4 g128", whole(4, 8), 128, "f16"),
        grouped("int4 g128 bf16", whole(4, 8), 128, "bf16"),
        grouped("int4 g64", whole(4, 8), 64, "bf16"),
        grouped("int4 g32", whole(4, 8), 32, "f16"),
        grouped("int4 g128 zero", whole(4), 128, "f16", zero=True),
        grouped("int8 g128", whole(8, 128), 128, "bf16"),
        grouped("int8 g128 zero", whole(8), 128, "f16", zero=True),
        grouped("int8", whole(8, 128), 0),
        grouped("fp8", E4M3, 0),
        grouped("fp8 g128", E4M3, 128),
        grouped("nf4", NF4, 64),
        grouped("mxfp4", E2M1, 32, "e8m0"),
        *GGUF_FORMATS.values(),
    )
}
"""Formats of quantised checkpoints."""

CATALOG: Mapping[str, Format] = {**QUANTISED, **{name: plain_code_format(name) for name in PLAIN_CODES}}
"""All packed formats: also those of plain parts that are stacked with quantised ones."""


def random_stored(
    form: Format, m: int, k: int, rng: np.random.Generator, ordered: bool = False, deviation: float = 1.0
) -> Stored:
    """A random matrix [m, k] whose numbers are about as large as those of a normal distribution of that deviation.

    ordered: whether its columns are in an order of their own. Memory is that of the codes, a byte each at least.
    """
    packing = form.packing
    assert packing is not None
    fields = {"code": Field((_random_codes(form, m, k, rng, deviation),))}
    size = 1.0 if packing.code.name in PLAIN_CODES else float(np.sqrt(np.mean(np.square(_finite(form))))) / deviation
    for part, dtype in packing.parts:
        count = -(-k // 128) if part.startswith("super_") else -(-k // packing.group) if packing.group else 1
        fields[part] = Field((element_plane(_random_part(part, dtype, (m, count), size, deviation, rng)),))
    order = rng.permutation(k).astype(np.int32) if ordered else None
    return Stored((m, k), form, fields, packing.nbytes(m, k), order)


def _finite(form: Format) -> np.ndarray[Any, Any]:
    assert form.packing is not None
    numbers = form.packing.code.numbers
    found: np.ndarray[Any, Any] = numbers[np.isfinite(numbers)]
    return found


def _random_codes(form: Format, m: int, k: int, rng: np.random.Generator, deviation: float) -> Plane:
    assert form.packing is not None
    code = form.packing.code
    if code.name in PLAIN_CODES:
        return element_plane((rng.standard_normal((m, k)) * deviation).astype(PART_DTYPES[code.name]))
    codes = rng.integers(0, 1 << code.bits, (m, k), dtype=np.uint8)
    if code.name == "e4m3":  # 0x7f and 0xff are no numbers
        codes[codes & 0x7F == 0x7F] = 0x38
    return element_plane(codes)


def _random_part(
    part: str, dtype: str, shape: tuple[int, int], size: float, deviation: float, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Numbers of a part: those of scales are around 1 / size, those of zeros and offsets in the middle of the codes."""
    values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if part in ("scale", "super_scale"):
        values *= 1 / size if part == "scale" else 1 / (32 * size)
    elif part in ("offset", "super_least"):
        values *= -deviation if part == "offset" else deviation / 32
    elif part == "zero":
        values *= size * deviation / 2
    else:
        values *= 32
        values *= rng.choice(np.array([-1, 1], np.float32), shape) if dtype == "i8" else 1
    return values.astype(PART_DTYPES[dtype])
