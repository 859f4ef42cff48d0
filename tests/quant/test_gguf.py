"""GGUF's tensor types against what the `gguf` package makes of random blocks (tools/make_gguf_goldens.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.errors import CheckpointError
from cuplama.gguf import TENSOR_TYPES, GGUFTensor
from cuplama.quant.catalog import CATALOG
from cuplama.quant.gguf import GGUF_FORMATS, GGUF_PLAIN, PermutedRows, tensor_data
from cuplama.quant.packed import pack
from cuplama.quant.stored import Stored
from cuplama.quant.weight import as_stored
from tests.paths import DATA

Array = np.ndarray[Any, Any]
TYPES = {t.name: t for t in TENSOR_TYPES.values()}


@pytest.fixture(scope="module")
def blocks() -> dict[str, Array]:
    with np.load(DATA / "gguf" / "blocks.npz") as data:
        return dict(data)


def tensor(kind: str, shape: tuple[int, ...], data: Array) -> GGUFTensor:
    return GGUFTensor("w", Path("m.gguf"), TYPES[kind], shape, data.reshape(-1).view(np.uint8))


def stored(kind: str, blocks: dict[str, Array], rows: Array | None = None) -> Stored:
    found = tensor_data(tensor(kind, blocks[f"{kind}.numbers"].shape, blocks[kind]), rows)
    assert isinstance(found, Stored)
    return found


def test_there_are_blocks_of_every_type(blocks: dict[str, Array]) -> None:
    assert set(blocks) == {name for kind in GGUF_FORMATS for name in (kind, f"{kind}.numbers")}
    assert all(len(x) > 2 and x.shape[-1] > 256 for name, x in blocks.items() if name.endswith(".numbers"))


@pytest.mark.parametrize("kind", GGUF_FORMATS)
def test_numbers(kind: str, blocks: dict[str, Array]) -> None:
    weight, wanted = stored(kind, blocks), blocks[f"{kind}.numbers"]
    assert np.array_equal(weight.numbers(), wanted)
    assert np.array_equal(weight[1:3].numbers(), wanted[1:3])
    assert (weight.shape, weight.format.name, weight.nbytes) == (wanted.shape, kind, blocks[kind].nbytes)


@pytest.mark.parametrize("kind", GGUF_FORMATS)
def test_rows_in_another_order(kind: str, blocks: dict[str, Array]) -> None:
    wanted = blocks[f"{kind}.numbers"]
    rows = np.random.default_rng(0).permutation(len(wanted))
    assert np.array_equal(stored(kind, blocks, rows).numbers(), wanted[rows])


@pytest.mark.parametrize("kind", GGUF_FORMATS)
def test_a_format_is_that_which_kernels_know(kind: str, blocks: dict[str, Array]) -> None:
    assert CATALOG[kind] is GGUF_FORMATS[kind]
    weight = stored(kind, blocks)
    packing = weight.format.packing
    assert packing is not None
    assert pack(weight).nbytes == packing.nbytes(*weight.shape)


def test_tensors_share_the_tables_of_their_columns(blocks: dict[str, Array]) -> None:
    first, second = stored("Q4_K", blocks), stored("Q4_K", blocks)
    for name, field in first.fields.items():
        for a, b in zip(field.planes, second.fields[name].planes, strict=True):
            assert a.columns is b.columns


@pytest.mark.parametrize("kind", GGUF_PLAIN)
def test_plain_types_are_views(kind: str) -> None:
    dtype: Any = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    numbers = np.arange(24, dtype=np.float32).astype(dtype).reshape(6, 4)
    view = tensor_data(tensor(kind, (6, 4), numbers))
    assert view.dtype == dtype
    assert np.array_equal(view, numbers)
    assert np.shares_memory(view, numbers)


def test_plain_rows_in_another_order() -> None:
    numbers, rows = np.arange(24, dtype=np.float32).reshape(6, 4), np.array([3, 1, 5, 0, 2, 4])
    found = tensor_data(tensor("F32", (6, 4), numbers), rows)
    assert isinstance(found, PermutedRows)
    assert (found.shape, len(found), found.nbytes, found.dtype) == ((6, 4), 6, numbers.nbytes, np.float32)
    assert np.array_equal(found[1:4], numbers[rows[1:4]])
    assert np.array_equal(np.concatenate([found, numbers]), np.concatenate([numbers[rows], numbers]))
    for dtype in (np.float32, ml_dtypes.bfloat16):
        other = tensor_data(
            tensor({4: "F32", 2: "BF16"}[np.dtype(dtype).itemsize], (6, 4), numbers.astype(dtype)), rows
        )
        assert np.array_equal(as_stored(other, np.dtype(np.float32)).numbers(), numbers[rows])


@pytest.mark.parametrize("kind", [*sorted(TYPES.keys() - GGUF_FORMATS.keys() - GGUF_PLAIN.keys())])
def test_other_types_are_refused_by_name(kind: str) -> None:
    block = TYPES[kind].block
    with pytest.raises(
        CheckpointError, match=rf"m\.gguf: tensor w has type {kind}; supported: matrices of F32, F16, BF16, Q4_0"
    ):
        tensor_data(tensor(kind, (1, block), np.zeros(TYPES[kind].nbytes, np.uint8)))


def test_a_quantised_tensor_that_is_no_matrix(blocks: dict[str, Array]) -> None:
    with pytest.raises(CheckpointError, match="tensor w has type Q8_0 and 1 dimensions; supported: matrices of"):
        tensor_data(tensor("Q8_0", (blocks["Q8_0.numbers"].shape[1],), blocks["Q8_0"][0]))
