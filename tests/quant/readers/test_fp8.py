"""fp8 and fbgemm_fp8 by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.quant.readers import check
from tests.quant.readers.made import BF16, E4M3, left, refusal, stored

BLOCKS = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
STATIC = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "ignored_layers": ["lm_head"],
}


def floats(m: int, k: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((m, k)).astype(E4M3)


@pytest.mark.parametrize(("m", "k"), [(256, 128), (200, 272), (16, 32)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_blocks(m: int, k: int, dtype: np.dtype[Any]) -> None:
    scale = np.random.default_rng(2).uniform(0.1, 1, (-(-m // 128), -(-k // 128))).astype(dtype)
    weight = stored(BLOCKS, {"x.weight": floats(m, k), "x.weight_scale_inv": scale})
    by_element = scale.astype(np.float32)[np.arange(m) // 128][:, np.arange(k) // 128]
    assert np.array_equal(weight.numbers(), floats(m, k).astype(np.float32) * by_element)
    assert weight.format.name == "fp8 g128"
    assert np.shares_memory(weight.fields["scale"].planes[0].data, scale)  # repeated in a table, not copied


def test_powers_of_two() -> None:
    scale = np.array([[0.25, 2.0]]).astype(ml_dtypes.float8_e8m0fnu)
    weight = stored(BLOCKS | {"scale_fmt": "ue8m0"}, {"x.weight": floats(16, 256), "x.weight_scale_inv": scale})
    wanted = floats(16, 256).astype(np.float32) * np.repeat([np.float32(0.25), np.float32(2)], 128)
    assert np.array_equal(weight.numbers(), wanted)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)])
def test_one_scale_for_all_or_each_row(name: str, shape: tuple[int, ...]) -> None:
    scale = np.random.default_rng(3).uniform(0.1, 1, shape).astype(BF16)
    one = np.ones((), np.float32)
    arrays = {"x.weight": floats(24, 32), f"x.{name}": scale, "x.activation_scale": one, "x.input_scale": one}
    weight = stored(STATIC, arrays)
    wanted = floats(24, 32).astype(np.float32) * scale.astype(np.float32).reshape(-1, 1)
    assert np.array_equal(weight.numbers(), wanted)
    assert weight.format.name == "fp8"
    assert dict(weight.format.packing.parts if weight.format.packing else ()) == {"scale": "f32"}


def test_rows_of_fbgemm() -> None:
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    scale = np.full((24, 1), 0.5, np.float32)
    plain = np.ones((4, 4), BF16)
    arrays = {"x.weight": floats(24, 32), "x.weight_scale": scale, "lm_head.weight": plain, "l.k_scale": scale[0]}
    assert check(settings, "config.json") == []
    assert np.array_equal(stored(settings, arrays).numbers(), floats(24, 32).astype(np.float32) * scale)
    assert {name: t.dtype for name, t in left(settings, arrays).items()} == {
        "x.weight": "fp8",
        "lm_head.weight": "BF16",
    }


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weight_block_size": [64, 64]}, "weight_block_size is [64, 64]; supported: [128, 128]"),
        ({"fmt": "e5m2"}, 'fmt is "e5m2"; supported: e4m3'),
        ({"activation_scheme": "some"}, 'activation_scheme is "some"; supported: dynamic, static'),
        ({"expert_dtype": "fp4"}, 'expert_dtype is "fp4"; supported: "fp8"'),
        ({"modules_to_not_convert": "lm_head"}, 'modules_to_not_convert is "lm_head"; supported: a list of names'),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], line: str) -> None:
    assert refusal(BLOCKS | change, {}).startswith(f"ConfigError: config.json: quantization_config.{line}")


@pytest.mark.parametrize(
    ("settings", "name", "value", "line"),
    [
        (
            BLOCKS,
            "weight_scale_inv",
            np.ones((1, 2), np.float32),
            "x.weight_scale_inv has shape [1, 2]; expected: [2, 2]",
        ),
        (BLOCKS, "weight_scale_inv", np.ones((), np.float32), "x.weight_scale_inv has shape []; expected: [2, 2]"),
        (BLOCKS, "weight_scale_inv", np.ones((2, 2), np.int32), "x.weight_scale_inv has dtype I32; expected: F32, F16"),
        (BLOCKS, "weight_scale_inv", None, "x.weight_scale_inv is missing beside x.weight"),
        (
            STATIC,
            "weight_scale_inv",
            np.ones((2, 2), np.float32),
            "x.weight_scale_inv has shape [2, 2]; expected: [] or",
        ),
        (
            BLOCKS,
            "weight",
            np.ones((200, 256), BF16),
            "x.weight_scale_inv is left over; there is no x.weight of dtype F8",
        ),
        (BLOCKS, "weight", np.ones(200).astype(E4M3), "x.weight has shape [200]; expected: two sizes, not 0"),
    ],
)
def test_tensors_that_are_refused(
    settings: dict[str, Any], name: str, value: np.ndarray[Any, Any] | None, line: str
) -> None:
    arrays: dict[str, Any] = {"x.weight": floats(200, 256), "x.weight_scale_inv": np.ones((2, 2), np.float32)}
    found = refusal(settings, {k: a for k, a in (arrays | {f"x.{name}": value}).items() if a is not None})
    assert found.startswith(f"CheckpointError: F: tensor {line}")
