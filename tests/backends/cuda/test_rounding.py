"""Weights that are quantised on a GPU: the kernels of quantise.cu on the emulator, bit for bit what NumPy makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.rounding import rounding_kernels
from cuplama.dtypes import DTYPES
from cuplama.quant.grid import GRIDS
from cuplama.quant.packed import Packed, pack
from cuplama.quant.rtn import Rounded
from cuplama.quant.weight import Weight
from tests.fakes import FakeGpu


def _matrix(m: int, k: int, dtype: str, seed: int = 0) -> Any:
    """Rows of very different sizes; zeros, and numbers whose scale float16 rounds to 0; ties of both signs."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, k)) * 0.02 * np.exp(2 * rng.standard_normal((m, 1)))
    w[1] = 0
    w[2] = 1e-9 * rng.standard_normal(k)
    w[3, : k // 2] = rng.choice([-0.25, 0.25, 0.125], k // 2)
    w[4] = np.round(w[4] * 40) / 40
    return w.astype(DTYPES[dtype])


def _loaded(parts: list[Any]) -> Packed:
    gpu = FakeGpu(emulate=True)
    gpu.checked = True
    backend = CudaBackend("bf16", gpu=gpu)
    found = backend.load_weight(Weight("w", tuple("w" * len(parts)), tuple(parts)))
    backend.end_loading()
    assert isinstance(found, Packed)
    return found


@pytest.mark.parametrize(
    ("name", "group", "dtype", "m", "k"),
    [
        ("int4", 128, "bf16", 37, 256),
        ("int4", 64, "f16", 16, 192),
        ("int4", 32, "f32", 33, 160),
        ("int8", 0, "f16", 37, 259),
        ("fp8", 0, "bf16", 18, 132),
        ("fp8", 0, "f32", 5, 77),
    ],
)
def test_blocks_are_what_numpy_packs(name: str, group: int, dtype: str, m: int, k: int) -> None:
    plain = _matrix(m, k, dtype)
    (segment,) = _loaded([Rounded(plain, GRIDS[name], group)]).segments
    want = pack(Rounded(plain, GRIDS[name], group))
    got = np.asarray(segment.data)
    assert got.shape == want.shape
    assert np.flatnonzero(got != want).tolist() == []


def test_parts_of_a_stack_are_one_segment_and_one_that_stays_plain_another() -> None:
    """Their borders lie within a block."""
    parts = [_matrix(m, 128, "bf16", m) for m in (24, 8, 21)]
    found = _loaded([*(Rounded(p, GRIDS["int4"], 128) for p in parts), parts[0]])
    assert [s.rows for s in found.segments] == [53, 24]
    want = pack(Rounded(np.concatenate(parts), GRIDS["int4"], 128))
    assert np.array_equal(np.asarray(found.segments[0].data), want)


def test_nothing_is_quantised_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> Any:
        raise AssertionError("quantised on the host")

    monkeypatch.setattr(Rounded, "_quantised", refuse)
    weight = Rounded(_matrix(16, 128, "bf16").T.copy().T, GRIDS["fp8"], 0)
    assert len(_loaded([weight, weight]).segments) == 1


def test_every_instance_is_listed_once() -> None:
    names = [name for _, name in rounding_kernels()]
    assert len(names) == len(set(names)) == 3 * (3 * 2 + 1 + 2)
    assert "quantise_codes<bf16, 4, 64, false>" in names
