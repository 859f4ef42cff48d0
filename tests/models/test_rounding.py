"""Weights that are quantised while a model is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import cuplama
from cuplama.backends.numpy import NumPyBackend
from cuplama.errors import ParameterError
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.rounding import linear_weights, round_weights
from cuplama.quant.grid import GRIDS
from cuplama.quant.rtn import Rounded
from cuplama.quant.weight import Weight
from tests.conversion.made import write_model
from tests.gguf_models import write_converted
from tests.paths import GOLDEN
from tests.tiny import CHARS, LLAMA


def test_the_layers_matrices_are_quantised_and_nothing_else() -> None:
    config = load_config(LLAMA)
    weights = load_weights(LLAMA, config)
    found = round_weights(weights, config, "int8")
    linear = linear_weights(config)
    assert linear[:4] == ("0.qkv_proj", "0.o_proj", "0.gate_up_proj", "0.down_proj")
    for name, weight in found.items():
        assert weight.packed == (name in linear)
        assert weight.packed or weight is weights[name]
        assert (weight.shape, weight.source) == (weights[name].shape, weights[name].source)
    assert [part.shape for part in found["0.qkv_proj"].parts] == [(32, 32), (16, 32), (16, 32)]


def test_a_matrix_that_no_group_divides_stays(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(LLAMA)
    with caplog.at_level(logging.WARNING, "cuplama"):
        found = round_weights(load_weights(LLAMA, config), config, "int4")
    assert caplog.messages == ["0.down_proj and 1 more stay unquantised: none of 128, 64, 32 divides 40"]
    assert not found["0.down_proj"].packed
    part = found["0.o_proj"].parts[0]
    assert isinstance(part, Rounded)
    assert part.group == 32


@pytest.mark.parametrize("quantize", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("folder", ["llama", "gpt2"])
def test_a_loaded_model_computes_with_the_rounded_numbers(quantize: str, folder: str, tmp_path: Path) -> None:
    """As one whose file holds them; GPT-2's matrices are stored transposed."""
    path = write_model(tmp_path / "model") if folder == "llama" else CHARS
    prompt = [5, 6, 7, 8]
    with cuplama.load(path, device="numpy") as plain:
        expected = plain.logits(prompt)
    config = load_config(path)
    rounded = round_weights(load_weights(path, config), config, quantize)
    with cuplama.load(path, device="numpy", quantize=quantize) as model:
        values = model.engine.runner.values
        for name in linear_weights(config):
            assert np.array_equal(values[name], rounded[name].stored(np.dtype(np.float32)).numbers())
        off = np.linalg.norm(model.logits(prompt) - expected) / np.linalg.norm(expected)
    assert 0 < off < {"int4": 0.6, "int8": 0.04, "fp8": 0.15}[quantize]


@pytest.mark.parametrize("quantize", ["int4", "int8", "fp8"])
def test_a_plain_gguf_file_is_quantised_as_its_folder_is(quantize: str, tmp_path: Path) -> None:
    """Its heads' rows lie in another order, so that queries and keys are no arrays but views of reordered rows."""
    path = write_converted(LLAMA, tmp_path / "model.gguf")
    (config, expected), (turned, found) = (
        (c, round_weights(load_weights(p, c), c, quantize)) for p, c in ((p, load_config(p)) for p in (LLAMA, path))
    )
    assert linear_weights(config) == linear_weights(turned)
    for name in linear_weights(config):
        assert found[name].shape == expected[name].shape
        loaded = [NumPyBackend().load_weight(weights[name]) for weights in (expected, found)]
        assert np.array_equal(*loaded)


def test_where_memory_is_short_weights_are_quantised_once_and_stay_so(tmp_path: Path) -> None:
    config = load_config(write_model(tmp_path))
    weight = round_weights(load_weights(tmp_path, config), config, "int4")["0.qkv_proj"]
    kept = NumPyBackend(convert=False).load_weight(weight)
    assert not any(isinstance(part, Rounded) for part in kept.parts)
    assert np.array_equal(kept[3:90].numbers(), NumPyBackend().load_weight(weight)[3:90])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("quantize", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("convert", [True, False])
def test_a_weight_that_is_not_finite_shows_in_the_logits_alone(quantize: str, convert: bool) -> None:
    plain = np.ones((8, 128), np.float32)
    plain[1, 5], plain[2, 3] = np.inf, np.nan
    weight = Weight("w", ("w",), (Rounded(plain, GRIDS[quantize], GRIDS[quantize].group),))
    loaded = NumPyBackend(convert=convert).load_weight(weight)
    assert convert or np.isfinite(loaded[[0, 3]].numbers()).all()
    assert not convert or (~np.isfinite(loaded)).any(1).tolist() == [False, True, True, *[False] * 5]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"quantize = 'int3' is not supported; supported: int4, int8, fp8"):
        cuplama.load(CHARS, quantize="int3")
    config = load_config(LLAMA)
    once = round_weights(load_weights(LLAMA, config), config, "fp8")
    with pytest.raises(ParameterError, match=r"quantize = 'int4': the model is quantised already; 0.qkv_proj is fp8"):
        round_weights(once, config, "int4")


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_experts_are_quantised_and_routers_are_not(name: str) -> None:
    """Each expert's rows as those of a matrix of its own; gpt-oss' lie transposed, and by turns."""
    folder = GOLDEN / name
    config = load_config(folder)
    weights = load_weights(folder, config)
    found = round_weights(weights, config, "int8")
    experts = found["0.experts.gate_up_proj"]
    assert experts.packed
    assert not found["0.router"].packed
    assert experts.shape == weights["0.experts.gate_up_proj"].shape
    numbers = experts.stored(np.dtype(np.float32)).numbers()
    plain = weights["0.experts.gate_up_proj"].array()
    scale = np.abs(plain).max(-1, keepdims=True) / 128
    assert np.abs(numbers - plain).max() > 0
    assert (np.abs(numbers - plain) <= scale * 1.01).all()  # a whole one where the far end has the other sign
