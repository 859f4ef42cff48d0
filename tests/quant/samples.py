"""Random stored matrices of every kind of format, and of a name: what tests of packed weights begin with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuplama.dtypes import DTYPES
from cuplama.quant.fields import Field, element_plane
from cuplama.quant.format import E4M3, NF4, PART_DTYPES, PLAIN_CODES, Format, Packing, decode, grouped, nested, whole
from cuplama.quant.stored import Stored

__all__ = ["SAMPLES", "random_stored"]


def _plain(name: str) -> Format:
    return Format(name, None, decode, Packing(PLAIN_CODES[name], 0, ()))


_ALL = (
    grouped("int4 g128", whole(4, 8), 128, "f16"),
    grouped("int4 g64 bf16", whole(4, 8), 64, "bf16"),
    grouped("awq g128", whole(4), 128, "f16", zero=True),
    grouped("awq g32", whole(4), 32, "bf16", zero=True),
    grouped("q4_0", whole(4, 8), 32, "f16"),
    grouped("q4_1", whole(4), 32, "f16", offset=True),
    grouped("q5_0", whole(5, 16), 32, "f16"),
    grouped("q5_1", whole(5), 32, "f16", offset=True),
    grouped("int8 g128", whole(8, 128), 128, "f16"),
    grouped("int8 zero", whole(8), 128, "f32", zero=True),
    grouped("int8 row", whole(8, 128), 0),
    grouped("int4 row", whole(4, 8), 0),
    grouped("fp8 row", E4M3, 0),
    grouped("fp8 g128", E4M3, 128),
    grouped("nf4 g64", NF4, 64),
    nested("q4_k", whole(4), 32, "u8", least=True),
    nested("q5_k", whole(5), 32, "u8", least=True),
    nested("q6_k", whole(6, 32), 16, "i8", least=False),
    nested("q2_k", whole(4), 16, "u8", least=True),
    *(_plain(name) for name in PLAIN_CODES),
)
SAMPLES = {form.name: form for form in _ALL}
"""A format of each kind that formats.cuh knows, by name."""


def random_stored(form: Format, m: int, k: int, seed: int = 0, size: float = 1.0) -> Stored:
    """A matrix of random codes whose numbers are about ``size`` large; subnormal 8-bit floats are among them."""
    rng = np.random.default_rng(seed)
    packing = form.packing
    assert packing is not None
    codes: Any = rng.integers(0, 1 << min(32, packing.code.bits), (m, k))
    if packing.code.name in PLAIN_CODES:
        floats = rng.standard_normal((m, k)).astype(np.float32).astype(DTYPES[packing.code.name])
        codes = floats.view(f"u{floats.itemsize}")
    elif packing.code is E4M3:
        codes = codes & ~(((codes & 0x7F) == 0x7F) << 3)  # no NaN
    bits = max(8, packing.code.bits)
    fields = {"code": Field((element_plane(codes.astype(f"u{bits // 8}")),))}
    numbers = packing.code.numbers if packing.code.name not in PLAIN_CODES else np.ones(1)
    groups = -(-k // packing.group) if packing.group else 1
    unit = size / float(np.sqrt(np.mean(numbers.astype(np.float64) ** 2)))
    for part, dtype in packing.parts:
        count = -(-k // 128) if part.startswith("super_") else groups
        values: Any
        if part == "zero":
            values = rng.integers(0, 1 << packing.code.bits, (m, count))
        elif part.startswith("sub_"):
            values = rng.integers(-64 if dtype == "i8" else 0, 64, (m, count))
        else:
            scale = {"scale": unit, "offset": size, "super_scale": unit / 32, "super_least": size / 32}[part]
            values = rng.uniform(0.5, 1.5, (m, count)) * scale
        fields[part] = Field((element_plane(np.ascontiguousarray(values.astype(PART_DTYPES[dtype]))),))
    return Stored((m, k), form, fields, sum(p.data.nbytes for f in fields.values() for p in f.planes))
