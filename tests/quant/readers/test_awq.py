"""AWQ's gemm layout by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.quant.readers import check
from tests.quant.readers.made import left, numbers, refusal, stored

M, K, GROUP = 24, 96, 32
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
# The column that each nibble of a word holds, low bits first, as AutoAWQ packs them.
COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[rows, out] -> i32 [rows, out / 8], nibble by nibble."""
    found = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for c in range(found.shape[1]):
        for i, column in enumerate(COLUMNS):
            found[:, c] |= codes[:, 8 * c + column].astype(np.uint32) << np.uint32(4 * i)
    return found.view(np.int32)


def made(group: int = GROUP) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """(tensors, the numbers [M, K] that they stand for)."""
    rng = np.random.default_rng(1)
    q, zero = rng.integers(0, 16, (K, M)), rng.integers(0, 16, (K // group, M))
    scale = rng.uniform(0.1, 1, (K // group, M)).astype(np.float16)
    arrays = {"x.qweight": words(q), "x.qzeros": words(zero), "x.scales": scale, "x.bias": np.ones(M, np.float16)}
    per = np.arange(K) // group
    return arrays, ((q - zero[per]) * scale.astype(np.float32)[per]).T


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"},
        SETTINGS | {"version": None, "backend": "autoawq", "modules_to_not_convert": ["lm_head"], "sym": True},
    ],
)
def test_numbers(settings: dict[str, Any]) -> None:
    arrays, wanted = made()
    assert check(settings, "config.json") == []
    weight = stored(settings, arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert weight.format.name == "int4 g32 zero"
    assert weight.nbytes == sum(a.nbytes for name, a in arrays.items() if name != "x.bias")
    assert set(left(settings, arrays)) == {"x.weight", "x.bias"}


def test_whole_rows() -> None:
    arrays, wanted = made(K)
    weight = stored(SETTINGS | {"group_size": -1}, arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert weight.format.packing is not None
    assert weight.format.packing.group == 128


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bits": 3}, "bits is 3; supported: 4"),
        ({"bits": None}, "bits is null; supported: 4"),
        ({"version": "gemv"}, 'version is "gemv"; supported: gemm'),
        ({"version": "gemv_fast"}, 'version is "gemv_fast"; supported: gemm'),
        ({"backend": "llm-awq"}, 'backend is "llm-awq"; supported: autoawq'),
        ({"zero_point": False}, "zero_point is false; supported: true"),
        ({"group_size": 100}, "group_size is 100; supported: -1 or a multiple of 16"),
        ({"group_size": None, "q_group_size": 7}, "q_group_size is 7; supported: -1 or a multiple of 16"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is [1]; supported: a list of names"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], line: str) -> None:
    assert refusal(SETTINGS | change, {}) == f"ConfigError: config.json: quantization_config.{line}"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("qzeros", np.zeros((3, 2), np.int32), "x.qzeros has shape [3, 2]; expected: [3, 3]"),
        ("qzeros", None, "x.qzeros is missing beside x.qweight"),
        ("scales", np.zeros((2, M), np.float16), "x.scales has shape [2, 24]; expected: [3, 24]"),
        ("scales", np.zeros((3, M)), "x.scales has dtype F64; expected: F32, F16, BF16"),
        ("qweight", np.zeros((K, 3), np.uint8), "x.qweight has dtype U8; expected: I32"),
        ("qweight", np.zeros(K, np.int32), "x.qweight has shape [96]; expected: two sizes, not 0"),
        ("qweight", np.zeros((0, 3), np.int32), "x.qweight has shape [0, 3]; expected: two sizes, not 0"),
        ("qweight", np.zeros((80, 3), np.int32), "x.qweight has 80 inputs; expected: a multiple of group_size 32"),
        ("qweight", None, "x.qzeros is left over; there is no x.qweight"),
        ("weight", np.zeros((M, K), np.float16), "x.weight is there beside x.qweight; expected: one of the two"),
    ],
)
def test_tensors_that_are_refused(name: str, value: np.ndarray[Any, Any] | None, line: str) -> None:
    arrays: dict[str, Any] = made()[0] | {f"x.{name}": value}
    assert refusal(SETTINGS, {k: a for k, a in arrays.items() if a is not None}) == f"CheckpointError: F: tensor {line}"


def test_plain_modules_stay() -> None:
    arrays = {"lm_head.weight": np.ones((4, 4), np.float16)}
    found = left(SETTINGS, arrays)
    assert found["lm_head.weight"].data is not None
    assert found["lm_head.weight"].dtype == "F16"
    assert np.array_equal(numbers(SETTINGS, made()[0] | arrays), made()[1])
