"""New adapters: which layers they are for, how they begin, and what is written of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.errors import ParameterError
from cuplama.models.config import load_config
from cuplama.models.lora import Adapter, LowRank
from cuplama.models.new_adapter import adapter_files, initial_weights, new_adapter
from tests.paths import GOLDEN

LLAMA, GPT2 = (load_config(GOLDEN / name) for name in ("llama3-gqa", "gpt2"))


def test_all_linear_layers_but_the_head_are_adapted_unless_some_are_named() -> None:
    config = new_adapter(LLAMA, 4)
    assert config.adapter is not None
    assert len(config.adapter.modules) == 14
    assert not any("lm_head" in module for module in config.adapter.modules)
    assert set(config.adapter.modules.values()) == {LowRank(4, 8.0)}
    assert new_adapter(LLAMA, 4, targets="all-linear") == config
    some = new_adapter(LLAMA, 4, 3, ["mlp.up_proj", "lm_head"])
    assert some.adapter == Adapter(
        {m: LowRank(4, 3.0) for m in ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")}
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "rank = 0 is out of range; it must be a whole number >= 1"),
        ((2.5,), "rank = 2.5 is a float"),
        ((4, float("nan")), "alpha = nan is out of range; it must be a number"),
        ((4, 4, ["q_proj", "wq"]), "targets: 'wq' is no linear layer of LlamaForCausalLM; known: down_proj, gate_proj"),
        ((4, 4, ["embed_tokens"]), "targets: 'embed_tokens' is no linear layer"),
        ((4, 4, [3]), "targets = [3]: 3 is an int; it must be names of linear layers"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ParameterError) as caught:
        new_adapter(LLAMA, *arguments)
    assert words in str(caught.value)


def test_a_new_adapter_changes_nothing_and_has_the_spread_of_peft() -> None:
    config = new_adapter(LLAMA, 64, targets=["q_proj", "v_proj"])
    found = initial_weights(config, 3)
    assert {n: a.shape for n, a in found.items()} == {n: s for n, s in config.weight_shapes().items() if ".lora_" in n}
    assert all(a.dtype == np.float32 for a in found.values())
    assert not any(a.any() for n, a in found.items() if n.endswith("lora_b"))
    a = found["1.qkv_proj.lora_a"].reshape(3, 64, 32)
    assert not a[1].any()  # of k
    for part in (a[0], a[2]):
        assert 0.98 / 32**0.5 < np.abs(part).max() <= 1 / 32**0.5
        assert abs(part.std() - (3 * 32) ** -0.5) < 0.005
    again, other = initial_weights(config, 3), initial_weights(config, 4)
    assert all(np.array_equal(found[n], again[n]) for n in found)
    assert not np.array_equal(a, other["1.qkv_proj.lora_a"].reshape(a.shape))
    assert not np.array_equal(a[0], a[2])


def test_a_part_that_is_not_adapted_is_not_written() -> None:
    config = new_adapter(LLAMA, 2, 6, ["v_proj"])
    arrays = {n: np.arange(np.prod(s), dtype=np.float32).reshape(s) for n, s in config.weight_shapes().items()}
    settings, tensors = adapter_files(config, arrays, "org/base")
    begin = "base_model.model.model.layers.0.self_attn.v_proj"
    assert len(tensors) == 4
    assert np.array_equal(tensors[f"{begin}.lora_A.weight"], arrays["0.qkv_proj.lora_a"][4:6])
    assert np.array_equal(tensors[f"{begin}.lora_B.weight"], arrays["0.qkv_proj.lora_b"][48:])
    assert settings == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 6,
        "target_modules": ["v_proj"], "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
        "fan_in_fan_out": False, "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True,
        "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip


def test_layers_and_ranks_that_no_name_says_are_written_one_by_one() -> None:
    up, down = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"
    modules = {up: LowRank(2, 2.5, True), down: LowRank(4, 2.5, True), "lm_head": LowRank(4, 1.0, True)}
    config = replace(LLAMA, adapter=Adapter(modules))
    arrays = {n: np.zeros(s, np.float32) for n, s in config.weight_shapes().items()}
    settings, _ = adapter_files(config, arrays, "")
    assert settings["target_modules"] == sorted(modules)
    assert (settings["r"], settings["rank_pattern"]) == (4, {up: 2})
    assert (settings["lora_alpha"], settings["alpha_pattern"]) == (2.5, {"lm_head": 1.0})
    assert settings["use_rslora"] is True


def test_gpt2_says_that_it_stores_its_matrices_transposed() -> None:
    config = new_adapter(GPT2, 2)
    arrays = {n: np.zeros(s, np.float32) for n, s in config.weight_shapes().items()}
    settings, tensors = adapter_files(config, arrays, "")
    assert (settings["fan_in_fan_out"], settings["target_modules"]) == (True, ["c_attn", "c_fc", "c_proj"])
    d = GPT2.hidden_size
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (3 * d, 2)
