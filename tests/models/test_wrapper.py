"""The text part of a model of text and more: its settings, its tensors by the family's names, and what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
from cuplama.conversion.source import Source
from cuplama.errors import CheckpointError, ConfigError
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config, parse_config
from cuplama.models.families import FAMILIES
from cuplama.models.family import Wrapper
from cuplama.models.peft import load_adapter
from tests.adapters import write_adapter
from tests.conversion.made import write_model
from tests.paths import GOLDEN

SEES = Wrapper(
    ("LlamaForConditionalGeneration",),
    "llama_vision",
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower.", "mtp."),
)
TEXT: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "attention_bias": True,
}  # fmt: skip
OUTER: dict[str, Any] = {
    "architectures": ["LlamaForConditionalGeneration"], "model_type": "llama_vision", "vision_config": {"depth": 2},
    "image_token_index": 7, "zebra": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def llama(monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(FAMILIES["LlamaForCausalLM"], wrappers=(SEES,))
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", found)


def raw(text: Mapping[str, Any] | None = None, **outer: Any) -> dict[str, Any]:
    found = {**OUTER, "text_config": {**TEXT, **(text or {})}, **outer}
    return {key: value for key, value in found.items() if value is not ...}


# --- Settings ------------------------------------------------------------------------------------


def test_the_text_part_is_a_model_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    config = parse_config(raw())
    assert (config.wrapper, config.hidden_size, config.flags) == (SEES, 32, frozenset({"qkv_bias", "o_bias"}))
    assert config.raw == {**TEXT, "architectures": ["LlamaForCausalLM"]}
    alone = parse_config(config.raw)
    assert replace(config, wrapper=None) == alone
    assert caplog.messages == []  # of what is beside text_config nothing is read, nor named


def test_fields_beside_the_text_part_that_count_for_it() -> None:
    quantised = {"quant_method": "fp8", "modules_to_not_convert": ["vision_tower", "language_model.lm_head"]}
    inner = {"torch_dtype": "float16", "eos_token_id": 5, "bos_token_id": 4, "tie_word_embeddings": True}
    outer = {"dtype": "bfloat16", "eos_token_id": [1, 2], "tie_word_embeddings": False}
    config = parse_config(raw(inner, **outer, bos_token_id=None, quantization_config=quantised))
    assert (config.dtype, config.eos, config.bos, config.tied) == ("bfloat16", (1, 2), 4, False)
    assert config.raw["quantization_config"]["modules_to_not_convert"] == ["vision_tower", "lm_head"]
    config = parse_config(raw({**inner, "quantization_config": quantised}))
    assert (config.dtype, config.eos, config.tied) == ("float16", (5,), True)
    assert config.raw["quantization_config"]["quant_method"] == "fp8"


def test_a_wrapper_may_be_named_by_its_model_type_alone() -> None:
    assert parse_config(raw(architectures=...)).wrapper == SEES
    assert parse_config(raw({"model_type": None})).wrapper == SEES  # only one family has it


def test_of_several_families_the_text_part_names_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "Qwen3ForCausalLM", replace(FAMILIES["Qwen3ForCausalLM"], wrappers=(SEES,)))
    text = {"num_key_value_heads": 4, "attention_bias": False}
    assert parse_config(raw({**text, "model_type": "qwen3"})).architecture == "Qwen3ForCausalLM"
    assert parse_config(raw(text)).architecture == "LlamaForCausalLM"
    with pytest.raises(ConfigError, match=r"text_config\.model_type = null is not supported; supported: llama, qwen3$"):
        parse_config(raw({"model_type": None}))


@pytest.mark.parametrize(
    ("text", "outer", "message"),
    [
        ({}, {"text_config": ...}, "text_config = null is not supported; supported: the settings of a llama model"),
        ({}, {"text_config": []}, "text_config = [] is not supported; supported: the settings of a llama model"),
        ({"model_type": "mamba"}, {}, 'text_config.model_type = "mamba" is not supported; supported: llama'),
        ({"model_type": ["llama"]}, {}, 'text_config.model_type = ["llama"] is not supported; supported: llama'),
        ({"num_experts": 8}, {}, "text_config.num_experts = 8 is not supported; supported: num_experts = 1 for "
                                 "LlamaForCausalLM"),
        ({"hidden_size": None}, {}, "text_config.hidden_size is null"),
        ({"hidden_size": 1.5}, {}, "text_config.hidden_size = 1.5 is not a positive whole number below 2^31"),
        ({"rope_scaling": {"type": "linear"}}, {}, "text_config.rope_scaling.factor is missing; rope type linear needs "
                                                   "it"),
        ({"rope_scaling": {"type": "odd"}}, {}, 'text_config.rope_scaling.rope_type = "odd" is not supported; '
                                                "supported: default, linear, dynamic, llama3, yarn, longrope"),
        ({"eos_token_id": "a"}, {}, "text_config.eos_token_id is 'a'; it must be a token id or a list of token ids"),
        ({}, {"eos_token_id": "a"}, "eos_token_id is 'a'; it must be a token id or a list of token ids"),
        ({}, {"dtype": 16}, 'dtype = 16 is not supported; supported: a name such as "bfloat16"'),
        ({}, {"quantization": {"bits": 4}}, 'quantization = {"bits": 4} is not supported; supported: quantization = '
                                            "null for LlamaForCausalLM"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(text: dict[str, Any], outer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw(text, **outer))
    assert str(caught.value) == f"config.json: {message}"


def test_what_nobody_reads_of_the_text_part_is_named(caplog: pytest.LogCaptureFixture) -> None:
    parse_config(raw({"stripes": 3}))
    assert caplog.messages == ["config.json: fields that nothing reads are left out: text_config.stripes"]


def test_other_classes_of_a_wrappers_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"architectures = .*Odd.*, LlamaForConditionalGeneration(,|$)"):
        parse_config(raw(architectures=["OddForSequenceClassification"]))


# --- Tensors -------------------------------------------------------------------------------------


def wrap(folder: Path, spelling: str, beside: tuple[str, ...] = ("mtp.weight",), **outer: Any) -> Path:
    """A model's folder made that of a wrapper, with tensors of other parts, a vision tower and ``beside``. spelling: of
    the text part's, "old" with all of it in front, "new" with the base model's part in front."""
    tensors = load_file(folder / "model.safetensors")
    front, head = {"old": ("language_model.model.", "language_model."), "new": ("model.language_model.", "")}[spelling]
    tensors = {
        f"{front}{name.removeprefix('model.')}" if name.startswith("model.") else head + name: array
        for name, array in tensors.items()
    }
    begin = {"old": "vision_tower.", "new": "model.vision_tower."}[spelling]
    for name in (f"{begin}a.weight", f"{begin}b.weight", *beside):
        tensors[name] = np.ones((2, 3), np.float32)
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**OUTER, "text_config": text, **outer}))
    return folder


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_text_part_runs(tied: bool, spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"tie_word_embeddings": tied, "torch_dtype": "float32"}
    plain = write_model(tmp_path / "plain", **options)
    folder = wrap(write_model(tmp_path / "wrapped", **options), spelling)
    with cuplama.load(plain, device="numpy") as one, cuplama.load(folder, device="numpy") as other:
        assert np.array_equal(one.logits([1, 2, 3]), other.logits([1, 2, 3]))
    parts = {"old": "mtp (1), vision_tower (2)", "new": "model.vision_tower (2), mtp (1)"}[spelling]
    assert caplog.messages == [f"only the text part runs; tensors of other parts are left out: {parts}"]


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize(("name", "outer"), [
    ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}),
    ("ministral3", {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}),
    ("mistral-window", {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}),
])  # fmt: skip
def test_the_text_part_of_published_wrappers_runs(
    name: str, outer: dict[str, Any], spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = wrap(shutil.copytree(GOLDEN / name, tmp_path / name), spelling, ("multi_modal_projector.weight",), **outer)
    with np.load(folder / "golden.npz") as golden, cuplama.load(folder, device="numpy", dtype="float32") as model:
        found, wanted = model.logits(golden["prompt_1"].tolist()), golden["logits_1"]
    assert np.abs(found - wanted).max() < 2e-4
    tower = "vision_tower" if spelling == "old" else "model.vision_tower"
    parts = ", ".join(f"{part} ({count})" for part, count in sorted({"multi_modal_projector": 1, tower: 2}.items()))
    assert caplog.messages == [f"only the text part runs; tensors of other parts are left out: {parts}"]


@pytest.mark.parametrize("begin", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_the_whole_model_is_one_of_the_text_part(begin: str, tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain")
    adapter = write_adapter(tmp_path / "adapter", plain)
    wanted = load_adapter(adapter, load_config(plain))[1]
    tensors = load_file(adapter / "adapter_model.safetensors")
    front = "base_model.model."
    longer = {name.replace(f"{front}model.", f"{front}{begin}", 1): array for name, array in tensors.items()}
    save_file(longer, adapter / "adapter_model.safetensors")
    found = load_adapter(adapter, load_config(wrap(write_model(tmp_path / "wrapped"), "new")))[1]
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name].array(), wanted[name].array()) for name in wanted)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    folder = wrap(write_model(tmp_path), "old")
    whole = load_file(folder / "model.safetensors")
    for name, words in {
        "audio_tower.weight": r"tensor audio_tower\.weight \[1\] has no place in LlamaForCausalLM",
        "language_model.model.odd": r"tensor language_model\.model\.odd \[1\] has no place in",
        "model.norm.weight": r"tensor (language_model\.)?model\.norm\.weight is .*model\.norm\.weight once more",
    }.items():
        save_file({**whole, name: np.ones(1, np.float32)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load_weights(folder, load_config(folder))


def test_a_text_part_is_written_as_a_model_of_its_own(tmp_path: Path) -> None:
    plain, folder = write_model(tmp_path / "plain"), wrap(write_model(tmp_path / "wrapped"), "new")
    one, other = Source.open(plain), Source.open(folder)
    assert other.names == one.names
    assert other.tensors.keys() == load_file(plain / "model.safetensors").keys()
    assert other.config.raw == one.config.raw


QUANTISED = {
    "quant_method": "compressed-tensors", "format": "int-quantized",
    "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize(
    "name",
    [f"language_model.{Q}", Q.replace("model.", "model.language_model."), "re:.*language_model.*q_proj", f"re:{Q}"],
)
def test_lists_of_modules_know_them_by_either_name(spelling: str, name: str, tmp_path: Path) -> None:
    """A module that a list leaves 16-bit and that is quantised is refused: so the list was understood."""
    folder = wrap(write_model(tmp_path, torch_dtype="float32"), spelling)
    (key,) = (n for n in load_file(folder / "model.safetensors") if n.endswith("layers.0.self_attn.q_proj.weight"))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {key: np.ones((64, 64), np.int8), f"{key}_scale": np.ones((64, 1), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    for ignore, refused in (([name], True), (["vision_tower", "re:.*lm_head"], False)):
        settings = {**QUANTISED, "ignore": ignore}
        (folder / "config.json").write_text(json.dumps({**content, "quantization_config": settings}))
        config = load_config(folder)
        if refused:
            with pytest.raises(CheckpointError, match="is quantised, but no group"):
                load_weights(folder, config)
        else:
            assert load_weights(folder, config)["0.qkv_proj"].packed
