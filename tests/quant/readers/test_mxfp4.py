"""MXFP4 by hand, as gpt-oss is published, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.quant.readers import check, read_quantised
from cuplama.quant.stored import Stored
from tests.quant.readers.made import refusal, tensors

E, M, GROUPS = 3, 6, 2
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def made() -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """(tensors, the numbers [E, M, 32 GROUPS] that they stand for): the even element is in the low half of a byte."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (E, M, GROUPS, 16), np.uint8)
    scales = rng.integers(100, 140, (E, M, GROUPS), np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(E, M, GROUPS, 32)
    numbers = NUMBERS[codes & 7] * np.where(codes & 8, -1, 1) * 2.0 ** (scales.astype(int) - 127)[..., None]
    arrays = {"x.proj_blocks": blocks, "x.proj_scales": scales, "x.proj_bias": np.ones((E, M), np.float16)}
    return arrays, numbers.reshape(E, M, -1)


def test_numbers() -> None:
    arrays, wanted = made()
    assert check(SETTINGS, "config.json") == []
    found = read_quantised(tensors(arrays), SETTINGS, "config.json")
    assert set(found) == {"x.proj", "x.proj_bias"}
    weight = found["x.proj"]
    assert (weight.shape, weight.dtype) == (wanted.shape, "mxfp4")
    assert isinstance(weight.data, Stored)
    assert np.array_equal(weight.data.numbers(), wanted.reshape(E * M, -1))
    assert weight.data.nbytes == arrays["x.proj_blocks"].nbytes + arrays["x.proj_scales"].nbytes


@pytest.mark.parametrize(
    ("name", "array", "line"),
    [
        ("x.proj_scales", None, "tensor x.proj_scales is missing beside x.proj_blocks"),
        ("x.proj_blocks", None, "tensor x.proj_scales is left over; there is no x.proj_blocks"),
        ("x.proj_blocks", np.zeros((M, 16), np.uint8), "x.proj_blocks has shape [6, 16]; expected: [6, 16, 1, 16]"),
        ("x.proj_scales", np.zeros((E, M, 3), np.uint8), "x.proj_scales has shape [3, 6, 3]; expected: [3, 6, 2]"),
        ("x.proj_scales", np.zeros((E, M, GROUPS), np.float16), "x.proj_scales has dtype F16; expected: U8, F8_E8M0"),
        ("x.proj", np.zeros((E, M, 64), np.float16), "x.proj is there beside x.proj_blocks; expected: one of the two"),
    ],
)
def test_tensors_that_do_not_fit(name: str, array: np.ndarray[Any, Any] | None, line: str) -> None:
    arrays, _ = made()
    arrays = {k: v for k, v in (arrays | {name: array}).items() if v is not None}
    assert line in refusal(SETTINGS, arrays)
