"""GPTQ, versions 1 and 2, by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.errors import ConfigError
from cuplama.quant.readers import check, settings_beside
from tests.quant.readers.made import codes_along, numbers, refusal, stored

M, K, GROUP = 24, 96, 32


def config(**more: Any) -> dict[str, Any]:
    """A quantization_config."""
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, **more}


def made(
    bits: int = 4, group: int = GROUP, zero: int | None = None, add: int = -1, g_idx: np.ndarray[Any, Any] | None = None
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """(tensors, the numbers [M, K] that they stand for). zero: of all groups; add: to zero points when stored."""
    rng = np.random.default_rng(1)
    q, zeros = rng.integers(0, 1 << bits, (K, M)), rng.integers(0, 1 << bits, (K // group, M))
    zeros = zeros if zero is None else np.full_like(zeros, zero)
    scale = rng.uniform(0.1, 1, (K // group, M)).astype(np.float16)
    per = np.arange(K) // group if g_idx is None else g_idx
    arrays = {
        "x.qweight": codes_along(q, bits, 0),
        "x.qzeros": codes_along((zeros + add) % (1 << bits), bits, 1),
        "x.scales": scale,
        "x.g_idx": per.astype(np.int32),
        "x.bias": np.ones(M, np.float16),
    }
    return arrays, ((q - zeros[per]) * scale.astype(np.float32)[per]).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("form", "add"), [("gptq", -1), ("gptq_v2", 0), (None, -1)])
def test_versions(bits: int, form: str | None, add: int) -> None:
    arrays, wanted = made(bits, add=add)
    assert (arrays["x.qzeros"] != 0).any()
    for key in ("checkpoint_format", "format"):
        weight = stored(config(bits=bits, **{key: form}), arrays)
        assert np.array_equal(weight.numbers(), wanted)
        assert weight.format.name == f"int{bits} g32 zero"


def test_a_zero_point_wraps_around_within_its_bits() -> None:
    arrays, wanted = made(zero=0)  # stored as 15
    assert arrays["x.qzeros"].view(np.uint32).max() == 0xFFFFFFFF
    assert np.array_equal(numbers(config(), arrays), wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("form", "add"), [("gptq", -1), ("gptq_v2", 0)])
def test_symmetric_codes_need_no_zero_points(bits: int, form: str, add: int) -> None:
    arrays, wanted = made(bits, zero=1 << (bits - 1), add=add)
    weight = stored(config(bits=bits, sym=True, checkpoint_format=form), arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert "zero" not in weight.fields
    # What the file holds counts, not what the settings say of it.
    arrays, wanted = made(bits, add=add)
    weight = stored(config(bits=bits, sym=True, checkpoint_format=form), arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert "zero" in weight.fields


def test_an_order_of_activations() -> None:
    g_idx = np.random.default_rng(2).permutation(np.arange(K) // GROUP)
    arrays, wanted = made(g_idx=g_idx)
    weight = stored(config(desc_act=True), arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert weight.order is not None
    assert np.array_equal(weight.order, np.argsort(g_idx, kind="stable"))
    # Groups that are neighbours in another order are sorted too.
    arrays, wanted = made(g_idx=2 - np.arange(K) // GROUP)
    assert np.array_equal(numbers(config(), arrays), wanted)


def test_without_an_order() -> None:
    arrays, wanted = made()
    del arrays["x.g_idx"]
    assert np.array_equal(numbers(config(), arrays), wanted)
    assert "x.g_idx is missing beside x.qweight" in refusal(config(desc_act=True), arrays)


def test_whole_rows() -> None:
    arrays, wanted = made(group=K)
    assert np.array_equal(numbers(config(group_size=-1), arrays), wanted)
    arrays, wanted = made(group=K, zero=8)
    weight = stored(config(group_size=-1, sym=True), arrays)
    assert np.array_equal(weight.numbers(), wanted)
    assert weight.format.name == "int4"


def test_settings_of_some_modules() -> None:
    narrow, wanted = made()
    wide, wanted8 = made(8, K, zero=128)
    arrays = narrow | {name.replace("x.", "l.down_proj."): a for name, a in wide.items()}
    arrays |= {"l.gate.weight": np.ones((2, 2), np.float16)}
    dynamic = {"-:.*gate": {}, r"+:.*\.down": {"bits": 8, "group_size": -1, "sym": True}, ".*": {"desc_act": True}}
    settings = config(dynamic=dynamic)
    assert check(settings, "config.json") == []
    assert np.array_equal(numbers(settings, arrays), wanted)
    assert np.array_equal(numbers(settings, arrays, "l.down_proj"), wanted8)
    assert stored(settings, arrays, "l.down_proj").format.name == "int8"
    dynamic["novel"] = {"frobnicate": 1}
    assert check(settings, "config.json") == ["quantization_config.dynamic.novel.frobnicate"]
    dynamic["novel"] = {"bits": 2}
    assert "quantization_config.dynamic.novel.bits is 2; supported: 4, 8" in refusal(settings, arrays)
    del dynamic["novel"]
    dynamic["+:("] = {}
    assert 'quantization_config.dynamic.+:( is "+:("; supported: regular expressions' in refusal(settings, arrays)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    assert settings_beside(tmp_path) is None
    path = tmp_path / "quantize_config.json"
    path.write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.01}))
    assert settings_beside(tmp_path) == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.01,
    }  # fmt: skip
    path.write_text(json.dumps({"bits": 3, "group_size": 128}))
    with pytest.raises(ConfigError, match=r"quantize_config\.json: bits is 3; supported: 4, 8$"):
        settings_beside(tmp_path)
    path.write_text(json.dumps({"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm"}))
    assert (settings_beside(tmp_path) or {})["quant_method"] == "awq"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bits": 3}, "bits is 3; supported: 4, 8"),
        ({"bits": "4"}, 'bits is "4"; supported: 4, 8'),
        ({"group_size": 24}, "group_size is 24; supported: -1 or a multiple of 16"),
        ({"checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"; supported: gptq, gptq_v2'),
        ({"format": "exl3"}, 'format is "exl3"; supported: gptq, gptq_v2'),
        ({"pack_dtype": "int64"}, 'pack_dtype is "int64"; supported: "int32"'),
        ({"is_marlin_format": True}, "is_marlin_format is true; supported: false"),
        ({"desc_act": "no"}, 'desc_act is "no"; supported: true, false'),
        ({"dynamic": [1]}, "dynamic is [1]; supported: an object of settings"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], line: str) -> None:
    assert refusal(config(**change), {}) == f"ConfigError: config.json: quantization_config.{line}"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("qzeros", np.zeros((3, 4), np.int32), "x.qzeros has shape [3, 4]; expected: [3, 3]"),
        ("qzeros", None, "x.qzeros is missing beside x.qweight"),
        ("scales", np.zeros((3, M + 1), np.float16), "x.scales has shape [3, 25]; expected: [3, 24]"),
        ("scales", np.zeros((3, M), np.int32), "x.scales has dtype I32; expected: F32, F16, BF16"),
        ("g_idx", np.zeros(K - 1, np.int32), "x.g_idx has shape [95]; expected: [96]"),
        ("g_idx", np.zeros(K, np.int64), "x.g_idx has dtype I64; expected: I32"),
        ("g_idx", np.zeros(K, np.int32), "x.g_idx does not put 32 of the 96 inputs into each of 3 groups"),
        ("g_idx", np.arange(K, dtype=np.int32), "x.g_idx does not put 32 of the 96 inputs into each of 3 groups"),
        ("qweight", np.zeros((10, M), np.int32), "x.qweight has 80 inputs of 4 bits; expected: a multiple of group_s"),
        ("qweight", None, "x.qzeros is left over; there is no x.qweight"),
    ],
)
def test_tensors_that_are_refused(name: str, value: np.ndarray[Any, Any] | None, line: str) -> None:
    arrays: dict[str, Any] = made()[0] | {f"x.{name}": value}
    found = refusal(config(), {k: a for k, a in arrays.items() if a is not None})
    assert found.startswith(f"CheckpointError: F: tensor {line}")
