"""Layers that differ in more than a window: sizes of their own, shared keys and values, what they are given of a token.

The golden models of Gemma 4 show that the numbers are right; here is what becomes of such layers elsewhere.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
from cuplama.backends.numpy import NumPyBackend
from cuplama.conversion.calibration import Calibration
from cuplama.engine.decode import decode_nodes
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.memory import cache_bytes
from cuplama.errors import CheckpointError, ConfigError, ParameterError
from cuplama.files import read_json
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config, parse_config
from cuplama.models.graph import decoder
from cuplama.train import gradients
from tests.paths import GOLDEN

# Layers with a window, the last of which shares keys and values, are 0, 1 and 3; those without are 2 and 4.
SHARED, SAME = GOLDEN / "gemma4-shared", GOLDEN / "gemma4-same"
CONFIG = load_config(SHARED)


def changed(folder: Path, out: Path, **tensors: np.ndarray[Any, Any]) -> Path:
    """A copy of a model's folder with more tensors."""
    shutil.copytree(folder, out)
    save_file({**load_file(out / "model.safetensors"), **tensors}, out / "model.safetensors")
    return out


def test_sizes_are_those_of_the_layer() -> None:
    shapes = CONFIG.weight_shapes()
    assert [layer.kv_layer for layer in CONFIG.layers] == [None, None, None, 1, 2]
    assert CONFIG.caches == {0: (2, 16), 1: (2, 16), 2: (2, 24)}
    assert CONFIG.head_dims == {16, 24}
    assert [shapes[f"{i}.qkv_proj"][0] for i in range(5)] == [8 * 16, 8 * 16, 8 * 24, 4 * 16, 4 * 24]
    assert [shapes[f"{i}.gate_up_proj"][0] for i in range(5)] == [112] * 3 + [224] * 2
    assert [f"{i}.k_norm" in shapes for i in range(5)] == [True] * 3 + [False] * 2
    assert shapes["embed_tokens_per_layer"] == (96, 5 * 12)


def test_transformers_and_published_files_spell_them_otherwise() -> None:
    """``per_layer_config``, or what it was made of."""
    for folder, more in ((SHARED, {}), (SAME, {"num_global_key_value_heads": 1})):
        raw = read_json(folder / "config.json")
        del raw["per_layer_config"]
        assert parse_config({**raw, "global_head_dim": 24, **more}) == load_config(folder)
    assert load_config(SAME).caches == {0: (2, 16), 1: (1, 24), 2: (2, 16), 3: (1, 24)}


def test_defaults_are_those_of_transformers() -> None:
    """Five of six layers have a window, and never the last one."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    config = parse_config({"architectures": ["Gemma4ForCausalLM"], "vocab_size": 96, **sizes})
    assert config.windows == (512,) * 5 + (0, 512, 0)
    assert (config.caches[0], config.caches[5]) == ((4, 256), (4, 512))
    assert (config.per_layer_size, config.per_layer_vocab, config.logits_cap) == (256, 262144, 0)
    local, whole = config.ropes.values()
    assert (local.type, local.theta, whole.type, whole.theta) == ("default", 1e4, "proportional", 1e6)
    assert whole.settings == {"partial_rotary_factor": 0.25}


def test_a_matrix_of_keys_and_values_counts_once() -> None:
    config = load_config(SAME)
    tensors = load_file(SAME / "model.safetensors")
    assert config.parameters(True) == sum(t.size for t in tensors.values())
    weights = load_weights(SAME, config)
    queries, keys, values = np.split(weights["1.qkv_proj"].array(), (4 * 24, 5 * 24))
    assert np.array_equal(keys, values)
    assert not np.array_equal(queries[:24], keys)


def test_tensors_that_a_layer_has_no_use_for_may_be_there(tmp_path: Path) -> None:
    """Published files hold keys and values of layers that share those of others."""
    name = "model.layers.{}.self_attn.{}.weight"
    found = changed(
        SHARED, tmp_path / "shared", **{name.format(3, part): np.ones((8, 4)) for part in ("k_proj", "k_norm")}
    )
    assert load_weights(found, CONFIG).keys() == load_weights(SHARED, CONFIG).keys()
    found = changed(SAME, tmp_path / "same", **{name.format(1, "v_proj"): np.ones((8, 4))})
    load_weights(found, load_config(SAME))
    found = changed(SHARED, tmp_path / "more", **{name.format(1, "v_norm"): np.ones(4)})
    with pytest.raises(CheckpointError, match=r"1.self_attn.v_norm.weight \[4\] has no place"):
        load_weights(found, CONFIG)


def test_a_wrapped_model_is_its_text_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(SHARED, folder := tmp_path / "model")
    text = read_json(SHARED / "config.json")
    outer = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}
    (folder / "config.json").write_text(json.dumps(outer))
    inner = {
        f"model.language_{name}" if name.startswith("model.") else name: t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    save_file(
        {**inner, "model.vision_tower.x": np.ones(2), "model.embed_audio.y": np.ones(2)}, folder / "model.safetensors"
    )
    found, wanted = load_weights(folder, load_config(folder)), load_weights(SHARED, CONFIG)
    assert all(np.array_equal(found[name].array(), weight.array()) for name, weight in wanted.items())
    assert found.keys() == wanted.keys()
    assert "left out: model.embed_audio (1), model.vision_tower (1)" in caplog.text


def test_the_cache_has_pages_of_each_size() -> None:
    cache = PagedCache(NumPyBackend(), CONFIG, 3)
    assert {name: a.shape for name, a in cache.arrays.items()} == {
        f"{i}.cache.{part}": (4, 2, PAGE, size) for i, size in ((0, 16), (1, 16), (2, 24)) for part in "kv"
    }
    assert cache_bytes(CONFIG, np.dtype(np.float32), 3 * PAGE) == 3 * PAGE * 4 * 2 * 2 * (16 + 16 + 24)


def test_a_prompt_ends_with_the_last_keys_and_values_that_are_cached() -> None:
    """Layers behind them, which have none, are for its last token."""
    cut = decoder(CONFIG).cut()
    read = {name for node in cut.body for name in node.ins}
    assert cut.body[-1].outs == ("2.cache.k", "2.cache.v")
    assert {name for name in CONFIG.weight_shapes() if name[0] in "34"} & read == set()
    assert "1.layer_input_gate" in read
    assert cut.between == ("2.rotated", "2.x0", "layer_inputs")
    behind = [node for node in cut.last if node.op in ("rope", "attention")]
    caches = [node.ins[1] for node in behind if node.op == "attention"]
    assert caches == ["2.cache.k", "1.cache.k", "2.cache.k"]
    assert [node.ins[1] for node in behind if node.op == "rope"] == ["last.rope.rows"] * 2
    assert [node.attrs["num_kv_heads"] for node in behind if node.op == "rope"] == [0, 0]


def test_one_that_shares_the_first_of_all_reads_the_last_tokens_too() -> None:
    """Then even what layers are given of a token is made for the last one alone."""
    config = replace(CONFIG, layers=(CONFIG.layers[0], replace(CONFIG.layers[3], kv_layer=0)))
    cut = decoder(config).cut()
    assert [node.op for node in cut.body][-1] == "kv_append"
    assert not any(node.ins[-1] == "embed_tokens_per_layer" for node in cut.body)
    assert [node.ins[0] for node in cut.last if node.op == "embedding"] == ["last.input_ids"]


def test_the_stored_scalar_comes_with_the_last_sum_of_a_layer() -> None:
    for folder, before in ((SHARED, "layer_input_norm"), (SAME, "mlp_post_norm")):
        nodes = {
            node.ins[3]: node
            for node in decoder(load_config(folder)).body
            if len(node.ins) > 3 and node.op == "rms_norm_add"
        }
        assert [*nodes] == [f"{i}.layer_scalar" for i in range(load_config(folder).num_layers)]
        assert nodes["1.layer_scalar"].ins[1] == f"1.{before}"
        assert nodes["1.layer_scalar"].outs == ("2.x0",)


def test_a_decode_step_fuses_what_it_can() -> None:
    """Norms of values are computed by themselves; layers without keys have nothing to append."""
    found = Counter(node.op for node in decode_nodes(decoder(CONFIG), 1))
    assert (found["append_attention"], found["attention"], found["kv_append"]) == (3, 2, 0)
    assert (found["qk_norm"], found["rope"]) == (5, 2)


def test_one_layer_of_every_kind() -> None:
    """Layers 0 and 1 are alike; the others refer to those that are left."""
    kinds = CONFIG.every_kind()
    assert [layer.kv_layer for layer in kinds.layers] == [None, None, 0, 1]
    assert kinds.weight_shapes()["embed_tokens_per_layer"] == (96, 4 * 12)
    assert decoder(kinds).body


def test_layers_that_read_more_than_the_stream_are_not_calibrated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Gemma4ForCausalLM: layers are calibrated one by one, .* only rounding"):
        Calibration(NumPyBackend(), CONFIG, [[3, 4]], tmp_path)


@pytest.mark.parametrize("folder", [SHARED, SAME], ids=lambda p: p.name)
def test_training_is_refused(folder: Path) -> None:
    refused = r"^Gemma4ForCausalLM cannot be trained: rms_norm_add: a stored scalar"
    with cuplama.load(folder, device="numpy", context=128) as model, pytest.raises(ParameterError, match=refused):
        gradients(model, np.array([[3, 4, 5]]))
