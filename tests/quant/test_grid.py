"""Grids of quantised numbers: nearest numbers, codes, and scales of groups."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.quant.grid import GRIDS, grid_format, inverse

BF16 = DTYPES["bf16"]


@pytest.mark.parametrize("name", list(GRIDS))
def test_the_nearest_number_is_nearest_and_its_code_stands_for_it(name: str) -> None:
    grid = GRIDS[name]
    numbers = grid.code.numbers[np.isfinite(grid.code.numbers)]
    ratios = np.random.default_rng(0).uniform(1.2 * grid.least, 1.2 * grid.most, 2000).astype(np.float32)
    nearest = grid.nearest(ratios.copy())
    assert np.array_equal(np.abs(nearest - ratios), np.abs(numbers[None] - ratios[:, None]).min(1))
    assert np.array_equal(grid.code.numbers[grid.codes(ratios.copy())], nearest)


def test_halves_go_to_even() -> None:
    halves = np.array([-7.5, -2.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert GRIDS["int4"].nearest(halves).tolist() == [-8, -2, 0, 0, 2, 2]
    assert GRIDS["fp8"].nearest(np.array([17.0, 19.0], np.float32)).tolist() == [16, 20]  # between 16, 18 and 20


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_of_a_group_is_on_the_grid(name: str, sign: int) -> None:
    """With the first of the scales that are tried; int4 may prefer to cut the largest off."""
    grid, w = GRIDS[name], np.zeros((1, 1, 64), np.float32)
    w[0, 0, 5] = sign * 0.3
    scale = grid.scales(w, np.dtype(np.float32))
    numbers = grid.nearest(w * inverse(scale)[..., None])
    assert numbers[0, 0, 5] == (grid.far if grid.signed else sign * grid.most)
    assert numbers[0, 0, 5] * scale[0, 0] == pytest.approx(sign * 0.3, rel=1e-6)


def test_a_scale_has_no_larger_error_than_that_of_the_whole_range() -> None:
    """And where some columns matter alone, theirs decides."""
    rng, grid = np.random.default_rng(1), GRIDS["int4"]
    w = rng.standard_normal((50, 4, 128)).astype(np.float32)

    def error(scale: Any, importance: Any = 1.0) -> Any:
        found = grid.nearest(w * inverse(scale)[..., None]) * scale[..., None]
        return (np.square(found - w) * importance).sum(-1)

    at = np.abs(w).argmax(-1)[..., None]
    whole = (np.take_along_axis(w, at, -1)[..., 0] / np.float32(-8)).astype(BF16).astype(np.float32)
    found = grid.scales(w, BF16)
    assert np.array_equal(found, found.astype(BF16).astype(np.float32))
    assert (error(found) <= error(whole)).all()
    assert error(found).sum() < 0.93 * error(whole).sum()
    importance = np.zeros((4, 128), np.float32)
    importance[:, :8] = 1
    chosen = grid.scales(w, BF16, importance)
    assert (error(chosen, importance) <= error(found, importance)).all()
    assert error(chosen, importance).sum() < 0.8 * error(found, importance).sum()


@pytest.mark.parametrize("name", list(GRIDS))
def test_zeros_and_what_is_too_small_for_a_scale(name: str) -> None:
    grid = GRIDS[name]
    w = np.array([[[0.0] * 32], [[1e-9] * 32]], np.float32)
    scale = grid.scales(w, np.dtype(np.float16))
    assert scale.tolist() == [[1], [1]]
    assert not grid.nearest(w * inverse(scale)[..., None]).any()


def test_formats_have_the_checkpoint_s_scales_by_groups_and_float32_by_rows() -> None:
    assert grid_format(GRIDS["int4"], 64, BF16).packing.parts == (("scale", "bf16"),)  # type: ignore[union-attr]
    assert grid_format(GRIDS["int8"], 0, np.dtype(np.float16)).packing.parts == (("scale", "f32"),)  # type: ignore[union-attr]
    assert grid_format(GRIDS["fp8"], 128, np.dtype(np.float32)).name == "fp8 g128"
    assert GRIDS["fp8"].most == ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max
