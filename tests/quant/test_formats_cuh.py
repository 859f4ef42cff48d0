"""cuda_src/formats.cuh: what kernels make of packed blocks, against what the format says the numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.ops.binding import BoundLaunch
from cuplama.ops.prototypes import prototypes
from cuplama.quant.catalog import CATALOG, random_stored
from cuplama.quant.fields import Field, element_plane
from cuplama.quant.format import PART_DTYPES, PLAIN_CODES
from cuplama.quant.packed import pack
from cuplama.quant.stored import Stored
from cuplama.simt.emulator import precompile, run

KERNELS = Path(__file__).resolve().parent / "kernels"
Array = np.ndarray[Any, Any]


def _type(name: str) -> str:
    packing = CATALOG[name].packing
    assert packing is not None
    return packing.type


def _launch(expression: str, *args: Any, grid: int = 1) -> None:
    proto = prototypes("formats.cu", KERNELS)[expression.split("<")[0]]
    run(BoundLaunch("formats.cu", expression, (grid, 1, 1), (32, 1, 1), 0, args, proto), folder=KERNELS)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """Kernels of the formats that are tested in this run, several in one call of g++."""
    ours = (item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function))
    found = []
    for name in dict.fromkeys(str(item.callspec.params["name"]) for item in ours if hasattr(item, "callspec")):
        W = _type(name)
        found += [f"size<{W}>", f"elements<{W}>", f"floats<{W}>", f"fragments<{W}, f16>", f"fragments<{W}, bf16>"]
    precompile([("formats.cu", e) for e in found], folder=KERNELS)


@pytest.mark.parametrize("name", CATALOG)
def test_elements(name: str) -> None:
    """A block is as large as the format says, and each element is the number that the format decodes."""
    stored = random_stored(CATALOG[name], 37, 200, np.random.default_rng(0))
    packing = stored.format.packing
    assert packing is not None
    size = np.zeros(1, np.int32)
    _launch(f"size<{packing.type}>", size)
    assert size[0] == packing.block_bytes
    y = np.zeros(stored.shape, np.float32)
    _launch(f"elements<{packing.type}>", pack(stored).view(np.uint32), y, np.int32(37), np.int32(200), grid=37)
    np.testing.assert_allclose(y, stored.numbers(), rtol=2e-7, atol=1e-6)


def _shares(numbers: Array) -> Array:
    """A block's numbers [16, 128] as lanes have them: [chunk, lane, half, 4 columns]."""
    return numbers.reshape(2, 8, 8, 4, 4).transpose(2, 1, 3, 0, 4).reshape(8, 32, 2, 4)


def _unscaled(stored: Any) -> tuple[Array, Array, Array]:
    """number(code) - zero of one block, and its scales and offsets, each [16, 128]."""
    form = stored.format
    codes = stored.fields["code"].read()
    plain = form.packing.code.name in PLAIN_CODES
    numbers = stored.numbers() if plain else form.packing.code.numbers[codes]
    parts = {}
    for part, dtype in form.packing.parts:
        bits = stored.fields[part].read()
        kind = PART_DTYPES[dtype]
        values = bits.astype(f"u{kind.itemsize}").view(kind).astype(np.float32)
        parts[part] = np.repeat(values, 128 // values.shape[1], 1)
    scale, offset = parts.get("scale", np.float32(1)), parts.get("offset", np.float32(0))
    if "super_scale" in parts:
        scale = parts["super_scale"] * parts["sub_scale"]
        offset = -parts["super_least"] * parts["sub_least"] if "super_least" in parts else offset
    return numbers - parts.get("zero", np.float32(0)), *(np.broadcast_to(v, (16, 128)) for v in (scale, offset))


@pytest.mark.parametrize("T", ["f16", "bf16"])
@pytest.mark.parametrize("name", CATALOG)
def test_fragments(name: str, T: str) -> None:
    """Lanes get their shares of a block, exactly where T holds the numbers, else rounded once."""
    stored = random_stored(CATALOG[name], 16, 128, np.random.default_rng(1))
    y = np.zeros((8, 32, 2, 2, 2), DTYPES[T])  # [chunk, lane, pair, half, element]
    parts = np.zeros((8, 32, 2, 2), np.float32)
    _launch(f"fragments<{_type(name)}, {T}>", pack(stored).view(np.uint32), y, parts)
    numbers, scales, offsets = _unscaled(stored)
    wanted = _shares(numbers).reshape(8, 32, 2, 2, 2).transpose(0, 1, 3, 2, 4)
    if name.startswith(("int", "Q", "fp8", "mxfp4")):
        assert np.array_equal(wanted.astype(DTYPES[T]).astype(np.float32), wanted), "T holds them all"
    assert np.array_equal(y.astype(np.float32), wanted.astype(DTYPES[T]).astype(np.float32))
    packing = stored.format.packing
    assert packing is not None
    if packing.group and packing.parts:
        for at, values in enumerate((scales, offsets)):
            np.testing.assert_allclose(parts[:, :, at], _shares(values)[..., 0], rtol=2e-7)


def test_every_code_of_mxfp4_with_every_scale() -> None:
    """Bit for bit what a code times a power of two is in float32, infinite where that is too large; kernels take what
    is below the normal numbers for 0."""
    codes = np.tile(np.arange(32, dtype=np.uint8) % 16, (255, 1))
    scales = np.arange(255, dtype=np.uint8)[:, None]  # 255 is no number
    fields = {"code": Field((element_plane(codes),)), "scale": Field((element_plane(scales),))}
    stored = Stored((255, 32), CATALOG["mxfp4"], fields, 0)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    with np.errstate(over="ignore"):
        wanted = np.ldexp(np.tile(np.concatenate([numbers, -numbers]), (255, 2)), scales.astype(np.int32) - 127)
        assert np.array_equal(stored.numbers().view(np.uint32), wanted.view(np.uint32))
    tiny = np.finfo(np.float32).tiny
    wanted = np.where((np.abs(wanted) < tiny) | (scales == 0), np.copysign(np.float32(0), wanted), wanted)
    y = np.zeros((255, 32), np.float32)
    _launch(f"elements<{_type('mxfp4')}>", pack(stored).view(np.uint32), y, np.int32(255), np.int32(32), grid=255)
    assert np.array_equal(y.view(np.uint32), wanted.view(np.uint32))


def test_a_scale_that_is_a_power_of_two_goes_into_the_numbers() -> None:
    """Exactly, over 2^32, for every code of mxfp4 and scales of 2^-93 to 2^33: with smaller ones numbers are next to 0,
    with larger ones infinite."""
    codes = np.tile(np.arange(128, dtype=np.uint8) % 16, (256, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], 4)
    fields = {"code": Field((element_plane(codes),)), "scale": Field((element_plane(scales),))}
    y = np.zeros((16, 8, 32, 2, 2, 2), DTYPES["bf16"])
    data = pack(Stored((256, 128), CATALOG["mxfp4"], fields, 0)).view(np.uint32)
    _launch(f"folded<{_type('mxfp4')}>", data, y, grid=16)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.tile(np.concatenate([numbers, -numbers]), (256, 8))
    exact = range(34, 161)  # below it numbers are smaller than what bf16 has of full precision
    for block, found in enumerate(y.astype(np.float64)):
        wanted = _shares(numbers[16 * block : 16 * block + 16]).reshape(8, 32, 2, 2, 2).transpose(0, 1, 3, 2, 4)
        for row in range(16):
            scale = 16 * block + row
            got = found[:, row % 8 * 4 : row % 8 * 4 + 4, :, row // 8]
            number = wanted[:, row % 8 * 4 : row % 8 * 4 + 4, :, row // 8]
            if scale in exact:
                assert np.array_equal(got, np.ldexp(number, scale - 127 - 32)), scale
            else:
                assert np.all(np.abs(got) < 2.0**-123 if scale < 34 else np.isinf(got) | (number == 0)), scale


@pytest.mark.parametrize("name", CATALOG)
def test_floats(name: str) -> None:
    stored = random_stored(CATALOG[name], 16, 128, np.random.default_rng(2))
    y = np.zeros((8, 32, 2, 4), np.float32)
    _launch(f"floats<{_type(name)}>", pack(stored).view(np.uint32), y)
    assert np.array_equal(y, _shares(_unscaled(stored)[0]))
