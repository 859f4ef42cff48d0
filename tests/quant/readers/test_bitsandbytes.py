"""bitsandbytes by hand: NF4 with and without quantised scales, 8-bit rows, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cuplama.quant.format import NF4_NUMBERS
from cuplama.quant.readers import check
from tests.quant.readers.made import BF16, Arrays, refusal, stored

M, K, BLOCK = 6, 128, 64
FOUR = {
    "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False,
}  # fmt: skip
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
STATE = "x.weight.quant_state.bitsandbytes__nf4"


def text(**state: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def made(block: int = BLOCK, nested: bool = False) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """(tensors, the numbers [M, K] that they stand for)."""
    rng = np.random.default_rng(1)
    q = rng.integers(0, 16, M * K).astype(np.uint8)
    count = M * K // block
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [M, K]}
    arrays = {
        "x.weight": (q[0::2] << 4 | q[1::2])[:, None],  # the earlier element in the upper half
        "x.weight.quant_map": np.array(NF4_NUMBERS, np.float32),
    }
    if nested:
        codes = rng.integers(0, 256, count).astype(np.uint8)
        table = rng.standard_normal(256).astype(np.float32)
        outer = rng.uniform(0.5, 1, -(-count // 4)).astype(np.float32)
        absmax = np.array([table[c] * outer[i // 4] + np.float32(0.125) for i, c in enumerate(codes)], np.float32)
        state |= {"nested_blocksize": 4, "nested_offset": 0.125, "nested_dtype": "float32"}
        arrays |= {"x.weight.absmax": codes, "x.weight.nested_quant_map": table, "x.weight.nested_absmax": outer}
    else:
        absmax = rng.uniform(0.1, 1, count).astype(np.float32)
        arrays["x.weight.absmax"] = absmax
    wanted = np.array(NF4_NUMBERS, np.float32)[q] * np.repeat(absmax, block)
    return arrays | {STATE: text(**state)}, wanted.reshape(M, K)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_nf4(block: int, nested: bool) -> None:
    arrays, wanted = made(block, nested)
    assert check(FOUR, "config.json") == []
    weight = stored(FOUR, arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert weight.format.name == f"nf4 g{block}"
    assert weight.nbytes == sum(a.nbytes for a in arrays.values())


def test_codes_in_a_container_of_another_dtype() -> None:
    arrays, wanted = made()
    arrays["x.weight"] = arrays["x.weight"].reshape(-1).view(BF16)[:, None]
    assert np.array_equal(stored(FOUR, arrays).numbers(), wanted)


def test_eight_bits() -> None:
    rng = np.random.default_rng(2)
    q, largest = rng.integers(-127, 128, (M, K)).astype(np.int8), rng.uniform(1, 2, M).astype(np.float32)
    arrays: Arrays = {"x.weight": q, "x.SCB": largest, "x.weight_format": np.zeros((), np.uint8)}
    weight = stored(EIGHT, arrays)
    np.testing.assert_allclose(weight.numbers(), q * (largest / 127)[:, None], rtol=1e-6)
    assert weight.format.name == "int8"
    arrays = {**arrays, "x.weight_format": np.ones((), np.uint8)}
    assert "x.SCB belongs to a weight whose weight_format is not 0" in refusal(EIGHT, arrays)
    arrays = {name: array for name, array in arrays.items() if name != "x.SCB"}
    assert "x.weight_format is left over; there is no x.SCB" in refusal(EIGHT, arrays)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, 'bnb_4bit_quant_type is "fp4"; supported: nf4'),
        ({"load_in_4bit": False, "_load_in_4bit": False}, "load_in_4bit is false; supported: true, or load_in_8bit"),
        ({"load_in_8bit": True}, "load_in_4bit is true; supported: true, or load_in_8bit true"),
        ({"load_in_8bit": 1}, "load_in_8bit is 1; supported: true, false"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], line: str) -> None:
    assert refusal(FOUR | change, {}).startswith(f"ConfigError: config.json: quantization_config.{line}")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "x.weight",
            np.zeros((M * K // 2 - 1, 1), np.uint8),
            "x.weight has 383 bytes; expected: 384 for 6 x 128 codes",
        ),
        ("x.weight", np.zeros((M, K), np.int8), "x.weight has dtype I8; expected: U8"),
        ("x.weight", None, "x.weight is missing beside x.weight.quant_state"),
        ("x.weight.absmax", np.zeros(11, np.float32), "x.weight.absmax has shape [11]; expected: [12]"),
        ("x.weight.absmax", np.zeros(12, np.uint8), "x.weight.absmax has dtype U8; expected: F32"),
        ("x.weight.absmax", None, "x.weight.absmax is missing beside x.weight"),
        ("x.weight.quant_map", np.zeros(16, np.float32), "x.weight.quant_map has other numbers than NF4"),
        ("x.weight.quant_map", np.zeros(15, np.float32), "x.weight.quant_map has shape [15]; expected: [16]"),
        (STATE, None, "x.weight.quant_map is left over; there is no x.weight.quant_state.bitsandbytes__nf4"),
        (STATE, np.zeros(4, np.uint8), f"{STATE} is no JSON with shape"),
        (STATE, text(shape=[M, K]), f"{STATE} is no JSON with shape, blocksize and nested_offset (KeyError: 'block"),
        (STATE, np.frombuffer(b"[" * 100_000, np.uint8), f"{STATE} is no JSON with shape"),
        (STATE, text(shape=[M], blocksize=64), f"{STATE} is no JSON with shape"),
        (STATE, text(shape=[M, -K], blocksize=64), f"{STATE} says shape [6, -128], blocksize 64 and nested_blocksize"),
        (
            STATE,
            text(shape=[10**400, K], blocksize=64),
            f"{STATE} says shape [1000000000000000000000000000000000000000",
        ),
        (
            STATE,
            text(shape=[M, K], blocksize=64, nested_blocksize=2**62, nested_offset=0),
            f"{STATE} says shape [6, 128], blocksize 64 and nested_blocksize 4611686018427387904; expected: whole",
        ),
        (
            STATE,
            text(shape=[M, K], blocksize=64, nested_blocksize=-1, nested_offset=0),
            f"{STATE} says shape [6, 128], blocksize 64 and nested_blocksize -1; expected: whole numbers from 1 to",
        ),
        (
            STATE,
            text(shape=[M, K], blocksize=64, nested_blocksize=256, nested_offset=10**400),
            f"{STATE} is no JSON with shape, blocksize and nested_offset (OverflowError: ",
        ),
        (STATE, text(shape=[M, K], blocksize=32), f"{STATE} says blocks of 32 and rows of 128; expected: whole bl"),
        (STATE, text(shape=[2 * M, K // 2], blocksize=128), f"{STATE} says blocks of 128 and rows of 64; expected"),
        (STATE.replace("nf4", "fp4"), text(), "x.weight.quant_state.bitsandbytes__fp4 says that the weight is in fp4"),
    ],
)
def test_tensors_that_are_refused(name: str, value: np.ndarray[Any, Any] | None, line: str) -> None:
    arrays: dict[str, Any] = made()[0] | {name: value}
    found = refusal(FOUR, {k: a for k, a in arrays.items() if a is not None})
    assert found.startswith(f"CheckpointError: F: tensor {line}")
    assert len(found) < 500


def test_quantised_scales_that_are_refused() -> None:
    arrays = made(nested=True)[0]
    short = arrays | {"x.weight.nested_absmax": np.ones(2, np.float32)}
    assert "x.weight.nested_absmax has shape [2]; expected: [3]" in refusal(FOUR, short)
    short = arrays | {"x.weight.nested_quant_map": np.ones(16, np.float32)}
    assert "x.weight.nested_quant_map has shape [16]; expected: [256]" in refusal(FOUR, short)
    del arrays["x.weight.nested_quant_map"]
    assert "x.weight.nested_quant_map is missing" in refusal(FOUR, arrays)
