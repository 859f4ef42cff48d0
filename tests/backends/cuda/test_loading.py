"""Quantised weights packed on a GPU: the kernels of pack.cu on the emulator, against ``pack`` of quant/packed.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.quant.fields import Field, Plane, element_plane, word_plane
from cuplama.quant.format import E2M1, E4M3, NF4, Format, grouped, nested, whole
from cuplama.quant.packed import Packed, pack
from cuplama.quant.stored import Stored
from cuplama.quant.weight import Weight, as_stored
from tests.fakes import FakeGpu

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return rng.integers(0, 1 << 32, shape, np.uint32).view(np.int32)


def _stored(form: Format, m: int, k: int, **fields: Field) -> Stored:
    return Stored((m, k), form, fields, 0)


def _scales(rng: np.random.Generator, m: int, groups: int, transposed: bool = False) -> Field:
    shape = (groups, m) if transposed else (m, groups)
    return Field((element_plane(rng.standard_normal(shape).astype(np.float16), transposed),))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def awq(rng: np.random.Generator, m: int, k: int, group: int = 128) -> Stored:
    """Words along out, in an order of their own; zeros as codes; scales [groups, out]."""
    groups, wide = -(-k // group), -(-m // 8)
    code = word_plane(_words(rng, k, wide), 4, m, along=1, transposed=True, order=_AWQ_ORDER)
    zero = word_plane(_words(rng, groups, wide), 4, m, along=1, transposed=True, order=_AWQ_ORDER)
    form = grouped("awq", whole(4), group, "f16", zero=True)
    return _stored(form, m, k, code=Field((code,)), zero=Field((zero,)), scale=_scales(rng, m, groups, True))


def gptq(rng: np.random.Generator, m: int, k: int, group: int = 64, order: bool = False, bits: int = 4) -> Stored:
    """Words along in; zeros along out, one less than meant. order: columns sorted by their group."""
    groups, each = -(-k // group), 32 // bits
    columns = rng.permutation(k).astype(np.int32) if order else None
    code = Field((word_plane(_words(rng, -(-k // each), m), bits, k, along=0, transposed=True),))
    zero = word_plane(_words(rng, groups, -(-m // each)), bits, m, along=1, transposed=True)
    stored = _stored(
        grouped(f"gptq{bits}", whole(bits), group, "f16", zero=True), m, k,
        code=code if columns is None else code.take_columns(columns),
        zero=Field((zero,), add=1), scale=_scales(rng, m, groups, True),
    )  # fmt: skip
    return replace(stored, order=columns)


def compressed(rng: np.random.Generator, m: int, k: int, group: int = 32) -> Stored:
    """Words along in, row by row, symmetric."""
    code = word_plane(_words(rng, m, -(-k // 8)), 4, k, along=1)
    form = grouped("compressed", whole(4, 8), group, "f16")
    return _stored(form, m, k, code=Field((code,)), scale=_scales(rng, m, -(-k // group)))


def channel(rng: np.random.Generator, m: int, k: int) -> Stored:
    """e4m3 with a scale for a whole row."""
    code = element_plane(rng.integers(0, 256, (m, k), np.uint8))
    scale = element_plane(rng.standard_normal((m, 1)).astype(np.float32))
    return _stored(grouped("channel", E4M3, 0), m, k, code=Field((code,)), scale=Field((scale,)))


def block_fp8(rng: np.random.Generator, m: int, k: int) -> Stored:
    """e4m3 with a scale for 128 rows and 128 columns."""
    code = element_plane(rng.integers(0, 256, (m, k), np.uint8))
    scale = element_plane(rng.standard_normal((-(-m // 128), -(-k // 128))).astype(np.float32))
    rows = Field((scale,)).take_rows(np.arange(m) // 128)
    return _stored(grouped("block", E4M3, 128), m, k, code=Field((code,)), scale=rows)


def signed8(rng: np.random.Generator, m: int, k: int) -> Stored:
    """Signed bytes, turned into those that are 128 more."""
    code = Field((element_plane(rng.integers(0, 256, (m, k), np.uint8)),), flip=0x80)
    return _stored(grouped("int8", whole(8, 128), 16, "f32"), m, k, code=code, scale=_floats(rng, m, -(-k // 16)))


def _floats(rng: np.random.Generator, m: int, groups: int) -> Field:
    return Field((element_plane(rng.standard_normal((m, groups)).astype(np.float32)),))


def nf4(rng: np.random.Generator, m: int, k: int) -> Stored:
    """The even element in the high half of a byte; groups of 64."""
    data = rng.integers(0, 256, -(-m * k // 2), np.uint8)
    i = np.arange(k, dtype=np.int64)
    code = Plane(data, 4, np.arange(m, dtype=np.int64) * k * 4, (i ^ 1) * 4)
    assert k % 2 == 0
    return _stored(grouped("nf4", NF4, 64, "f32"), m, k, code=Field((code,)), scale=_floats(rng, m, -(-k // 64)))


def mxfp4(rng: np.random.Generator, m: int, k: int) -> Stored:
    """The even element in the low half of a byte; a power of two for 32 columns."""
    data = rng.integers(0, 256, (m, k // 2), np.uint8).reshape(-1)
    i = np.arange(k, dtype=np.int64)
    code = Plane(data, 4, np.arange(m, dtype=np.int64) * k * 4, i * 4)
    scale = element_plane(rng.integers(0, 255, (m, k // 32), np.uint8))
    return _stored(grouped("mxfp4", E2M1, 32, "e8m0"), m, k, code=Field((code,)), scale=Field((scale,)))


def _k_blocks(rng: np.random.Generator, m: int, k: int, size: int) -> tuple[Any, Any, Any]:
    """Bytes of m rows of blocks of 256 columns; the bits where each row begins, and each column's block."""
    blocks = k // 256
    data = rng.integers(0, 256, m * blocks * size, np.uint8)
    i = np.arange(k, dtype=np.int64)
    return data, np.arange(m, dtype=np.int64) * blocks * size * 8, (i // 256 * size * 8, i % 256)


def q6_k(rng: np.random.Generator, m: int, k: int) -> Stored:
    """Four bits and two, signed scales of 16 columns, a float16 for 256."""
    data, rows, (block, i) = _k_blocks(rng, m, k, 210)
    half, within, line = i // 128, i % 32, i % 128 // 32
    low = Plane(data, 4, rows, block + (half * 64 + line % 2 * 32 + within) * 8 + line // 2 * 4)
    high = Plane(data, 2, rows, block + (128 + half * 32 + within) * 8 + line * 2)
    sub = Plane(data, 8, rows, (block + (192 + i // 16) * 8)[::16])
    top = Plane(data, 16, rows, (block + 208 * 8)[::128])
    form = nested("q6_k", whole(6, 32), 16, "i8", least=False)
    return _stored(form, m, k, code=Field((low, high)), sub_scale=Field((sub,)), super_scale=Field((top,)))


def q5_k(rng: np.random.Generator, m: int, k: int) -> Stored:
    """Four bits and one; scales and least values of four bits and two."""
    data, rows, (block, i) = _k_blocks(rng, m, k, 176)
    low = Plane(data, 4, rows, block + (48 + i // 64 * 32 + i % 32) * 8 + i % 64 // 32 * 4)
    high = Plane(data, 1, rows, block + (16 + i % 32) * 8 + i // 32)
    starts, group = block[::32], i[::32] // 32
    later = group >= 4

    def six(first: int, nibble: int) -> Field:
        """The six bits of a group: whole in a byte of the first eight, or four bits of the last four and two."""
        four = np.where(later, (8 + group % 4) * 8 + nibble, (first + group % 4) * 8)
        two = np.where(later, (first + group % 4) * 8 + 6, (first + group % 4) * 8 + 4)
        return Field((Plane(data, 4, rows, starts + 32 + four), Plane(data, 2, rows, starts + 32 + two)))

    tops = {
        name: Field((Plane(data, 16, rows, (block + at * 8)[::128]),))
        for name, at in (("super_scale", 0), ("super_least", 2))
    }
    form = nested("q5_k", whole(5), 32, "u8", least=True)
    return _stored(form, m, k, code=Field((low, high)), sub_scale=six(0, 0), sub_least=six(4, 4), **tops)


def q4_1(rng: np.random.Generator, m: int, k: int) -> Stored:
    """Blocks of 20 bytes: scale, offset, 32 codes."""
    blocks = k // 32
    data = rng.integers(0, 256, m * blocks * 20, np.uint8)
    i = np.arange(k, dtype=np.int64)
    rows, block = np.arange(m, dtype=np.int64) * blocks * 160, i // 32 * 160
    code = Plane(data, 4, rows, block + 32 + i % 16 * 8 + i % 32 // 16 * 4)
    parts = {name: Field((Plane(data, 16, rows, block[::32] + at),)) for name, at in (("scale", 0), ("offset", 16))}
    return _stored(grouped("q4_1", whole(4), 32, "f16", offset=True), m, k, code=Field((code,)), **parts)


# ---- packing ---------------------------------------------------------------------------------------------------------


def packed(parts: Sequence[Any], dtype: str = "bf16", folder: Path | None = None) -> Packed:
    """The parts as a weight, loaded by the CUDA backend. folder: where its kernels are, if not in cuda_src/."""
    gpu = FakeGpu(emulate=True)
    gpu.checked, gpu.folder = True, folder
    backend = CudaBackend(dtype, gpu=gpu)
    found = backend.load_weight(Weight("w", tuple("w" * len(parts)), tuple(parts)))
    backend.end_loading()
    assert isinstance(found, Packed)
    return found


def assert_packed(found: Packed, *stacks: Sequence[Stored]) -> None:
    """The segments are the stacks, each packed as NumPy packs it."""
    assert found.shape == (sum(len(s) for stack in stacks for s in stack), stacks[0][0].shape[1])
    assert [s.rows for s in found.segments] == [sum(map(len, stack)) for stack in stacks]
    for segment, stack in zip(found.segments, stacks, strict=True):
        want = pack(stacked(stack))
        got = np.asarray(segment.data)
        assert segment.format == stack[0].format
        assert got.shape == want.shape
        assert np.flatnonzero(got != want).tolist() == []
        order: Any = segment.order
        assert (order is None) == (stack[0].order is None)
        assert order is None or np.array_equal(order, np.asarray(stack[0].order))


def stacked(parts: Sequence[Stored]) -> Stored:
    """Parts of one format as one matrix, whose fields are plain arrays."""
    first, fields = parts[0], dict[str, Field]()
    for name in first.fields:
        numbers = np.concatenate([p.fields[name].read() for p in parts])
        fields[name] = Field((element_plane(numbers),))
    return Stored((sum(map(len, parts)), first.shape[1]), first.format, fields, 0, first.order)


LAYOUTS: Mapping[str, Any] = {
    "awq": lambda rng: awq(rng, 40, 200),
    "gptq": lambda rng: gptq(rng, 24, 136),
    "gptq-order": lambda rng: gptq(rng, 16, 128, order=True),
    "gptq8": lambda rng: gptq(rng, 20, 72, bits=8),
    "compressed": lambda rng: compressed(rng, 19, 140),
    "channel": lambda rng: channel(rng, 37, 129),
    "block-fp8": lambda rng: block_fp8(rng, 150, 136),
    "signed8": lambda rng: signed8(rng, 5, 31),
    "nf4": lambda rng: nf4(rng, 33, 70),
    "mxfp4": lambda rng: mxfp4(rng, 21, 160),
    "q6_k": lambda rng: q6_k(rng, 18, 256),
    "q5_k": lambda rng: q5_k(rng, 3, 512),
    "q4_1": lambda rng: q4_1(rng, 17, 160),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_packed_as_numpy_packs_it(name: str) -> None:
    check_layout(name)


def check_layout(name: str, folder: Path | None = None) -> None:
    """A layout, with the kernels of another folder than cuda_src/ if one is given."""
    stored = LAYOUTS[name](np.random.default_rng(1))
    assert_packed(packed([stored], folder=folder), [stored])


STACKED = [(awq, 136), (gptq, 136), (compressed, 136), (channel, 136), (q5_k, 256)]


@pytest.mark.parametrize(("layout", "k"), STACKED)
def test_parts_of_one_format_are_one_segment(layout: Any, k: int) -> None:
    check_stack(layout, k)


def check_stack(layout: Any, k: int, folder: Path | None = None) -> None:
    """Borders of parts lie within a tile, and their words are strided differently."""
    rng = np.random.default_rng(2)
    parts = [layout(rng, m, k) for m in (24, 8, 40)]
    assert_packed(packed(parts, folder=folder), parts)


def test_what_differs_in_format_or_order_is_a_segment_of_its_own() -> None:
    rng = np.random.default_rng(3)
    first, second = (gptq(rng, m, 64, order=True) for m in (8, 16))
    same = Stored(second.shape, second.format, second.fields, 0, np.array(second.order))
    other = compressed(rng, 7, 64)
    assert_packed(packed([first, second, same, other]), [first], [second, same], [other])


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_plain_part_is_packed_in_the_backends_dtype(dtype: str) -> None:
    rng = np.random.default_rng(4)
    plain, quantised = rng.standard_normal((21, 130)).astype(np.float32), compressed(rng, 9, 130)
    want = as_stored(plain, DTYPES[dtype])
    assert_packed(packed([plain, quantised, plain[:3]], dtype), [want], [quantised], [want[:3]])


def test_some_rows_of_a_tensor_take_only_their_bytes_along() -> None:
    """In any order, as where llama's rows of q and k are put back."""
    rng = np.random.default_rng(5)
    whole_ = compressed(rng, 64, 128)
    rows = whole_[np.array([33, 34, 20, 21, 50])]
    sizes = list[int]()
    gpu = FakeGpu(emulate=True)
    backend, stage = CudaBackend("bf16", gpu=gpu), gpu.stage_pieces

    def staged(array: Any, pieces: Any) -> None:
        sizes.extend(data.size for _, data in pieces)
        stage(array, pieces)

    gpu.stage_pieces = staged  # type: ignore[method-assign]
    found: Any = backend.load_weight(Weight("w", ("w",), (rows,)))
    backend.end_loading()
    assert_packed(found, [rows])
    assert 31 * 64 in sizes  # rows 20 to 50 of 64 bytes


def test_the_buffer_of_raw_bytes_is_kept_from_weight_to_weight() -> None:
    """As long as it is large enough, and until loading ends; what is queued still finds its bytes there."""
    rng = np.random.default_rng(6)
    gpu = FakeGpu(emulate=True)
    backend = CudaBackend("bf16", gpu=gpu)
    stored = [awq(rng, m, 128) for m in (64, 32, 64)]
    found: list[Any] = [backend.load_weight(Weight("w", ("w",), (s,))) for s in stored]
    assert len(gpu.alive) == len(stored) + 1
    backend.end_loading()
    assert len(gpu.alive) == len(stored)
    for one, s in zip(found, stored, strict=True):
        assert_packed(one, [s])
