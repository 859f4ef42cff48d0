"""Layers with a gated delta rule: their weights, their nodes, and what becomes of such models elsewhere."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cuplama.backends.numpy import NumPyBackend
from cuplama.conversion.source import Source
from cuplama.dtypes import DTYPES
from cuplama.engine.memory import fit, state_bytes
from cuplama.errors import CheckpointError, ConfigError, ParameterError
from cuplama.files import read_json
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import ModelConfig, load_config, parse_config
from cuplama.models.export import checkpoint_tensors
from cuplama.models.graph import decoder
from cuplama.models.lora import Adapter, LowRank
from cuplama.models.presets import SHAPES
from cuplama.models.rounding import round_weights
from cuplama.ops.launch import Device
from cuplama.train import gradients
from tests.adapters import write_adapter
from tests.paths import GOLDEN
from tests.tiny import DELTA, copy, load

CONFIG = load_config(DELTA)  # d 48; layers 0 to 2 are delta layers; 4 heads and 2 KV heads of 16
PROMPT = [5, 17, 3, 60, 9, 11]


def _tensors(folder: Path, **changes: np.ndarray[Any, Any] | None) -> Path:
    """Other tensors in a copy of ``DELTA``; None takes one out."""
    shutil.copytree(DELTA, folder)
    found = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: t for name, t in found.items() if t is not None}, folder / "model.safetensors")
    return folder


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_layers_are_of_two_kinds() -> None:
    assert CONFIG.delta_layers == (0, 1, 2)
    assert CONFIG.caches == {3: (2, 16)}
    assert [layer.rope is None for layer in CONFIG.layers] == [True, True, True, False]
    assert CONFIG.state_shapes == ((3, 2 * 32 + 144), (6, 16, 24))
    names = {name.split(".", 1)[1] for name in CONFIG.weight_shapes() if name.startswith("0.")}
    assert {"delta_in_proj", "delta_conv", "delta_A_log", "attn_norm"} <= names
    assert not names & {"qkv_proj", "o_proj", "q_norm", "attn_gate_proj"}
    names = {name.split(".", 1)[1] for name in CONFIG.weight_shapes() if name.startswith("3.")}
    assert {"qkv_proj", "o_proj", "q_norm", "attn_gate_proj", "attn_norm"} <= names
    assert not any("delta" in name for name in names)


def test_queries_and_gates_lie_head_by_head_in_one_tensor() -> None:
    weights, tensors = load_weights(DELTA, CONFIG), load_file(DELTA / "model.safetensors")
    both = tensors["model.layers.3.self_attn.q_proj.weight"].reshape(4, 2, 16, 48)
    assert np.array_equal(weights["3.qkv_proj"].array()[: 4 * 16], both[:, 0].reshape(-1, 48))
    assert np.array_equal(weights["3.attn_gate_proj"].array(), both[:, 1].reshape(-1, 48))
    k = tensors["model.layers.3.self_attn.k_proj.weight"]
    assert np.array_equal(weights["3.qkv_proj"].array()[64:96], k)


def test_the_gates_of_the_rule_stay_float32() -> None:
    weights = load_weights(DELTA, CONFIG)
    found = {name: NumPyBackend("bf16").load_weight(w).dtype.name for name, w in weights.items()}
    assert {name for name, dtype in found.items() if dtype == "float32"} == {
        f"{i}.delta_{name}" for i in range(3) for name in ("A_log", "dt_bias")
    }
    assert weights["0.delta_A_log"].device_bytes(DTYPES["bf16"]) == 4 * 6


def test_layers_that_guess_further_tokens_are_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    further = {name: np.zeros(2, np.float32) for name in ("mtp.fc.weight", "mtp.norm.weight")}
    folder = _tensors(tmp_path / "m", **further)
    with caplog.at_level(logging.WARNING, "cuplama"):
        assert load_weights(folder, CONFIG).keys() == load_weights(DELTA, CONFIG).keys()
    assert caplog.messages == ["tensors that no layer of the model has are left out: mtp (2)"]


def test_the_text_part_of_a_published_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its tensors have longer names, beside those of vision and of further tokens."""
    text = read_json(DELTA / "config.json")
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    folder = copy(DELTA, tmp_path / "m", config=outer)
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(DELTA / "model.safetensors").items()
    }
    others = {
        name: np.zeros(2, np.float32) for name in ("model.visual.norm.weight", "mtp.norm.weight", "mtp.fc.weight")
    }
    save_file({**tensors, **others}, folder / "model.safetensors")
    with load(DELTA, context=64) as wanted, load(folder, context=64) as model:
        assert np.array_equal(model.logits(PROMPT), wanted.logits(PROMPT))
    assert "tensors of other parts are left out: model.visual (1), mtp (2)" in caplog.text


def test_experts_may_be_merged(tmp_path: Path) -> None:
    """As files of Qwen3.5 have them, where transformers saves each of its own."""
    folder = copy(GOLDEN / "qwen35-moe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        begin = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            np.stack([tensors.pop(f"{begin}{e}.{name}_proj.weight") for e in range(7)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{begin}gate_up_proj": np.concatenate([gate, up], 1), f"{begin}down_proj": down}
    save_file(tensors, folder / "model.safetensors")
    with load(GOLDEN / "qwen35-moe", context=64) as wanted, load(folder, context=64) as model:
        assert np.array_equal(model.logits(PROMPT), wanted.logits(PROMPT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.3.self_attn.q_proj.weight": np.zeros((64, 48), np.float32)}, r"shape \[64, 48\];.*\[128, 48\]"),
        ({"model.layers.0.linear_attn.conv1d.weight": np.zeros((208, 4), np.float32)}, r"shape \[208, 4\];.*\[208, 1"),
        ({"model.layers.0.linear_attn.A_log": None}, r"tensor model.layers.0.linear_attn.A_log is missing"),
        ({"model.layers.0.self_attn.q_norm.weight": np.zeros(16, np.float32)}, "has no place"),
    ],
)  # fmt: skip
def test_wrong_missing_and_left_over_tensors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_weights(_tensors(tmp_path / "m", **changes), CONFIG)


# ---- config ----------------------------------------------------------------------------------------------------------


def _changed(**changes: Any) -> ModelConfig:
    raw = {**read_json(DELTA / "config.json"), **changes}
    return parse_config({name: value for name, value in raw.items() if value is not ...})


def test_an_interval_says_where_attention_is() -> None:
    assert _changed(layer_types=..., num_hidden_layers=8).delta_layers == (0, 1, 2, 4, 5, 6)
    assert _changed(layer_types=..., full_attention_interval=2).delta_layers == (0, 2)
    assert _changed(layer_types=["full_attention", "linear_attention"] * 2).delta_layers == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "layer_types = "),
        ({"layer_types": ["linear_attention", "mamba"] * 2}, r"layer_types\[1\] = \"mamba\" .*linear_attention"),
        ({"layer_types": ..., "full_attention_interval": 0}, "full_attention_interval = 0"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads = 5 .*a multiple of linear_num_key_heads"),
        ({"linear_key_head_dim": 2.5}, "linear_key_head_dim = 2.5"),
        ({"attn_output_gate": False}, "attn_output_gate = false"),
        ({"attention_bias": True}, "attention_bias = true"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _changed(**changes)


def test_other_families_have_no_such_layers() -> None:
    raw = {**read_json(DELTA / "config.json"), "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    with pytest.raises(ConfigError, match=r"layer_types\[0\] = \"linear_attention\" is not supported"):
        parse_config({name: value for name, value in raw.items() if "rope" not in name})


# ---- elsewhere -------------------------------------------------------------------------------------------------------


def test_such_models_are_not_trained_nor_converted(tmp_path: Path) -> None:
    with (
        load(DELTA, context=64) as model,
        pytest.raises(ParameterError, match=r"Qwen3_5ForCausalLM cannot be trained: gated delta layers"),
    ):
        gradients(model, [[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="takes tensors apart, and nothing can quantise such a model yet"):
        Source.open(DELTA)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_such_models_are_quantised_as_they_are_loaded(quantize: str) -> None:
    with load(DELTA, context=64) as plain, load(DELTA, context=64, quantize=quantize) as model:
        wanted, found = plain.logits(PROMPT), model.logits(PROMPT)
        assert 0 < np.abs(found - wanted).max() < 3
    rounded = round_weights(load_weights(DELTA, CONFIG), CONFIG, quantize)
    assert {name for name, w in rounded.items() if w.packed} == {
        node.ins[1] for node in decoder(CONFIG).body if node.op == "linear"
    }


def test_an_adapter_changes_queries_and_gates(tmp_path: Path) -> None:
    """As the same model does whose matrices are the sums."""
    targets = ("q_proj", "v_proj", "in_proj_qkv", "in_proj_a", "out_proj")
    adapter = write_adapter(tmp_path / "adapter", DELTA, targets)
    found, tensors = load_file(adapter / "adapter_model.safetensors"), load_file(DELTA / "model.safetensors")
    merged = dict(tensors)
    for name in tensors:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in found:
            product = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
            merged[name] = tensors[name] + 2.0 * product
    folder = copy(DELTA, tmp_path / "merged")
    save_file(merged, folder / "model.safetensors")
    with load(DELTA, context=64, adapter=adapter) as model, load(folder, context=64) as wanted:
        np.testing.assert_allclose(model.logits(PROMPT), wanted.logits(PROMPT), atol=5e-4)
    size = Adapter({"model.layers.3.self_attn.q_proj": LowRank(3, 6.0)}).parameters(CONFIG.own_recipes(), CONFIG.dims)
    assert size == 3 * (128 + 48)


def test_an_eight_bit_cache_is_for_the_layers_that_have_keys() -> None:
    with load(DELTA, context=64) as plain, load(DELTA, context=64, kv_cache_dtype="fp8") as model:
        cache = model.engine.cache
        assert {a.dtype.name for name, a in cache.arrays.items() if name not in cache.states.arrays} == {
            "float8_e4m3fn"
        }
        wanted, found = plain.logits(PROMPT), model.logits(PROMPT)
        assert 0 < np.abs(found - wanted).max() < 0.5


# ---- memory ----------------------------------------------------------------------------------------------------------

GB = 1000**3


def _large() -> ModelConfig:
    """The shape of Qwen3.6-27B."""
    return parse_config(SHAPES["qwen3.6-27b"])


@pytest.mark.parametrize(("free", "running"), [(80 * GB, 60), (140 * GB, 240)])
def test_states_and_keys_share_what_is_free(free: int, running: int) -> None:
    config, bf16 = _large(), DTYPES["bf16"]
    assert state_bytes(config, bf16) == 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)
    weights = 2 * config.parameters(False)
    _, plan = fit(config, weights, bf16, 8192, None, (4096, 2048), free, Device(), running=256)
    assert plan.total <= free
    assert plan.states == (plan.slots + 1) * state_bytes(config, bf16)
    assert plan.slots >= running
    assert plan.slots <= 264
    assert plan.tokens > 100_000
    assert f"states ({plan.slots} slots)" in plan.describe()


def test_a_cache_of_some_tokens_has_no_more_slots_than_pages_have_owners() -> None:
    config, bf16 = _large(), DTYPES["bf16"]
    _, plan = fit(config, 54 * GB, bf16, 512, 512, (2048,), 140 * GB, Device(), running=256)
    assert plan.slots == 512 // 64 + 8
    _, least = fit(config, 54 * GB, bf16, 512, 512, (2048,), 55_500_000_000, Device(), running=256)
    assert 1 <= least.slots < 8


def test_a_model_goes_back_to_its_files() -> None:
    """Queries and gates are one tensor again."""
    arrays = {name: weight.array() for name, weight in load_weights(DELTA, CONFIG).items()}
    found, tensors = dict(checkpoint_tensors(CONFIG, arrays)), load_file(DELTA / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
