"""Adapters as PEFT saves them: which layers the settings mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cuplama.errors import CheckpointError, ConfigError
from cuplama.models.config import load_config
from cuplama.models.peft import load_adapter
from tests.adapters import write_adapter
from tests.paths import GOLDEN

LLAMA, GPT2 = GOLDEN / "llama3-gqa", GOLDEN / "gpt2"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(folder: Path, error: type[Exception], base: Path = LLAMA) -> str:
    with pytest.raises(error) as caught:
        load_adapter(folder, load_config(base))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"; supported: lora'),
        ({"peft_type": None}, "peft_type is missing; supported: lora"),
        ({"task_type": "SEQ_CLS"}, 'task_type is "SEQ_CLS"; supported: "CAUSAL_LM"'),
        ({"bias": "all"}, 'bias is "all"; supported: "none"'),
        ({"use_dora": True}, "use_dora is true; supported: false"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"use_qalora": True}, "use_qalora is true"),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights is "pissa_niter_4"; supported: true or false or'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]; supported: []'),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
        ({"target_parameters": ["x"]}, "target_parameters is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"arrow_config": {"top_k": 3}}, 'arrow_config is {"top_k": 3}; supported: adapters without it'),
        ({"some_new_field": 1}, "some_new_field is 1; supported: adapters without it"),
        ({"r": 0}, "r is 0; supported: a positive whole number"),
        ({"r": "8"}, 'r is "8"; supported'),
        ({"lora_alpha": None}, "lora_alpha is missing; supported: a number"),
        ({"use_rslora": 1}, "use_rslora is 1; supported: true, false"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern.q_proj is 2.5; supported: a positive whole number"),
        ({"rank_pattern": {"q_proj": 2}}, "2}; supported: the same rank and alpha for model.layers.0"),
        ({"alpha_pattern": {"v_proj": 2}}, "layers.0.self_attn.v_proj, which are one matrix here"),
        ({"alpha_pattern": {"v_proj": "2"}}, 'alpha_pattern.v_proj is "2"; supported: a number'),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]; supported: an object"),
        ({"rank_pattern": {"(": 2}}, 'rank_pattern is "("; supported: regular expressions'),
        ({"target_modules": None}, "target_modules is missing; supported: a list of names, a regular"),
        ({"target_modules": []}, "target_modules is []; supported: a list"),
        ({"target_modules": [1]}, "target_modules is [1]; supported: a list"),
        ({"target_modules": ["query_key_value"]}, "layers that LlamaForCausalLM has: down_proj, gate_proj, k_proj,"),
        ({"target_modules": "("}, 'target_modules is "("; supported: regular expressions'),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 'target_modules is "model.embed_tokens"; supported: linear'),
        ({"target_modules": "model.norm|.*q_proj"}, 'target_modules is "model.norm"; supported: linear layers: down_'),
        ({"exclude_modules": 5}, "exclude_modules is 5; supported: a list"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "supported: layers that LlamaForCausalLM has"),
        ({"layers_to_transform": ["1"]}, 'layers_to_transform is ["1"]; supported: a number'),
        ({"layers_to_transform": [7]}, "supported: layers that LlamaForCausalLM has"),
        ({"layers_pattern": 3}, "layers_pattern is 3; supported: a name"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    said = refused(write_adapter(tmp_path, LLAMA, **changes), ConfigError)
    assert said.startswith(f"{tmp_path / 'adapter_config.json'}: ")
    assert words in said


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "modules_to_save": [], "some_new_field": False, "another": {}, "eva_config": {"rho": 2.0}, "loftq_config": {},
        "lora_dropout": 0.1, "megatron_core": "megatron", "peft_version": "0.21.2", "init_lora_weights": "gaussian",
        "fan_in_fan_out": True, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "task_type": None,
    }  # fmt: skip
    config, weights = load_adapter(write_adapter(tmp_path, LLAMA, **more), load_config(LLAMA))
    assert config.adapter is not None
    assert (config.adapter.base, len(config.adapter.modules), len(weights)) == ("org/llama3-gqa", 4, 4)
    assert not weights["0.qkv_proj.lora_a"].parts[1].any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"target_modules": ["self_attn.k_proj"]}, "0k 1k"),
        ({"target_modules": ["model.layers.1.self_attn.k_proj", "v_proj"]}, "0v 1k 1v"),
        ({"target_modules": "ALL-linear", "exclude_modules": r".*\.mlp\..*|.*o_proj"}, "0k 0q 0v 1k 1q 1v"),
        ({"target_modules": r"model\.layers\.[1-9]\.self_attn\.[qk]_proj"}, "1k 1q"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "1q"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, "0q"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": []}, "0q 1q"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]}, "0q 1k 1q"),
    ],
)  # fmt: skip
def test_which_layers_the_settings_mean(settings: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    names = [f"model.layers.{w[0]}.self_attn.{w[1]}_proj" for w in wanted.split()]
    config, _ = load_adapter(write_adapter(tmp_path, LLAMA, names, **settings), load_config(LLAMA))
    assert config.adapter is not None
    assert sorted(config.adapter.modules) == names


def test_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    """The first pattern that fits the end of a name counts; a dot is any character, as in PEFT."""
    patterns: dict[str, Any] = {
        "rank_pattern": {"1.mlp.up_proj|1.mlp.gate_proj": 5},
        "alpha_pattern": {"down_proj": 9, ".*": 4.5},
    }
    write_adapter(tmp_path, LLAMA, ["gate_proj", "up_proj", "down_proj"], **patterns)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, t in tensors.items():
        if ".1.mlp.up_proj" in name or ".1.mlp.gate_proj" in name:
            tensors[name] = np.resize(t, (5, t.shape[1]) if "lora_A" in name else (len(t), 5))
    save_file(tensors, file)
    config, weights = load_adapter(tmp_path, load_config(LLAMA))
    found = {name: (added.rank, added.alpha) for name, added in config.low_ranks.items()}
    assert found == {
        "0.gate_up_proj": (3, 4.5), "1.gate_up_proj": (5, 4.5), "0.down_proj": (3, 9), "1.down_proj": (3, 9),
    }  # fmt: skip
    assert weights["1.gate_up_proj.lora_a"].shape == (10, 32)
    assert weights["1.gate_up_proj.lora_b"].shape == (80, 5)


def _changed(folder: Path, change: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(B), f"tensor {B} is missing"),
        (lambda t: t.update({f"{Q0}.lora_A.default.weight": t[A]}), f"{Q0}.lora_A.default.weight [3, 32] has no"),
        (lambda t: t.update({A.replace("q_proj", "k_proj"): t[A]}), "k_proj.lora_A.weight [3, 32] has no place in the"),
        (lambda t: t.update({A: t[A][:2]}), f"tensor {A} has shape [2, 32]; adapter_config.json asks for [3, 32]"),
        (lambda t: t.update({B: t[B].T.copy()}), f"tensor {B} has shape [3, 32]; adapter_config.json asks for [32, 3]"),
        (lambda t: t.update({A: t[A].astype(np.int32)}), f"tensor {A} has dtype I32; supported: F32, F16, BF16"),
        (lambda t: t.update({A: t[A].astype(np.float16)}), "have different dtypes"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    assert words in refused(_changed(write_adapter(tmp_path, LLAMA), change), CheckpointError)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    assert "layers that GPT2LMHeadModel has: c_attn, c_fc, c_proj" in refused(
        write_adapter(tmp_path, LLAMA), ConfigError, GPT2
    )


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    assert "adapter_config.json does not exist; an adapter is a folder as PEFT saves it" in refused(
        tmp_path, ConfigError
    )
    assert "is not a folder; an adapter is one that holds adapter_config.json" in refused(
        LLAMA / "config.json", ConfigError
    )
    file = write_adapter(tmp_path / "a", LLAMA) / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    said = refused(tmp_path / "a", CheckpointError)
    assert said.endswith(
        "adapter_model.safetensors does not exist (adapter_model.bin cannot be read; convert to safetensors)"
    )
    assert refused(tmp_path, ConfigError).endswith(f"adapter_config.json does not exist; {tmp_path / 'a'} has one")
    file.with_suffix(".bin").unlink()
    assert refused(tmp_path / "a", CheckpointError).endswith("adapter_model.safetensors does not exist")


def test_an_adapter_that_was_made_for_the_model_without_its_head(tmp_path: Path) -> None:
    """transformers' GPT2Model calls its layers "h.0...."."""
    write_adapter(tmp_path, GPT2, ["c_attn"])
    wanted = load_adapter(tmp_path, load_config(GPT2))[1]

    def shorten(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(".transformer.", ".")] = tensors.pop(name)

    found = load_adapter(_changed(tmp_path, shorten), load_config(GPT2))[1]
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name].array(), w.array()) for name, w in wanted.items())


def test_settings_that_are_no_json(tmp_path: Path) -> None:
    (write_adapter(tmp_path, LLAMA) / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not valid JSON" in refused(tmp_path, ConfigError)
