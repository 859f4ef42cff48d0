"""Fields of config.json that nobody reads: harmless ones in silence, all others by name, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import ConfigError
from cuplama.models.config import load_config, parse_config
from cuplama.models.families import FAMILIES
from cuplama.models.presets import SHAPES
from tests.models.test_config import raw, refusal
from tests.paths import GOLDEN, ROOT

# The fields beside the sizes that public files show, as a model's config.json or as a copy of one; the values of some
# are shortened.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("Llama", {
        "_name_or_path": "x", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
        "use_cache": True, "initializer_range": 0.04, "transformers.js_config": {"dtype": "q4"},
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False,
    }),
    "Llama 1": ("Llama", {"max_sequence_length": 2048, "pad_token_id": -1, "architectures": ["LLaMAForCausalLM"],
                          "model_type": "llama"}),
    "Llama 2": ("Llama", {"_name_or_path": "x", "pretraining_tp": 2, "rope_scaling": None, "pad_token_id": 0}),
    "unsloth": ("Llama", {"unsloth_fixed": True, "unsloth_version": "2024.9", "pad_token_id": 5, "use_cache": False}),
    "YaRN Llama 2": ("Llama", {
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        "gradient_checkpointing": False,
        "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
    }),
    "Falcon 3": ("Llama", {"head_dim": 8, "bos_token_id": 11, "eos_token_id": 11, "pretraining_tp": 1,
                           "attention_bias": False, "mlp_bias": False, "rope_scaling": None}),
    "a window that is off": ("Llama", {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 21}),
    "Qwen2.5": ("Qwen2", {"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096,
                          "max_window_layers": 1, "attention_bias": False}),
    "Qwen3": ("Qwen3", {"attention_bias": False, "layer_types": ["full_attention"] * 2, "dtype": "bfloat16"}),
    "Phi-4-mini": ("Phi3", {
        "auto_map": {}, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "partial_rotary_factor": 0.75, "attention_bias": False, "mlp_bias": False,
        "original_max_position_embeddings": 4096, "sliding_window": 262144, "attention_dropout": 0.0,
    }),
    "Mistral": ("Mistral", {"sliding_window": 4096, "pad_token_id": 2, "use_cache": True}),
    "DistilGPT-2": ("GPT2", {
        "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_ctx": 1024, "embd_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index", "resid_pdrop": 0.1,
        "attn_pdrop": 0.1, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }),
    "GPT-2 as it was converted": ("GPT2", {"n_ctx": 1024, "n_special": 0, "predict_special_tokens": True}),
    "an old dump of everything": ("GPT2", {
        "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_length": 20, "num_beams": 1,
        "bad_words_ids": None, "chunk_size_feed_forward": 0, "is_decoder": False, "output_past": True, "prefix": None,
        "pruned_heads": {}, "repetition_penalty": 1.0, "return_dict": True, "tie_encoder_decoder": False,
        "torchscript": False, "use_bfloat16": False, "xla_device": None, "finetuning_task": None,
        "early_stopping": False,
    }),
}  # fmt: skip
FOLDERS = [ROOT / "weights", *sorted(p.parent for p in GOLDEN.glob("*/config.json"))]


@pytest.mark.parametrize(("family", "fields"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_fields_are_known(family: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    parse_config(raw(family, **fields))
    assert caplog.messages == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_our_own_configs_are_known(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(folder)
    assert caplog.messages == []


def test_known_shapes_and_public_configs_are_known(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, shape in SHAPES.items():
        parse_config(shape, name)
    for folder in (shared / "configs").iterdir():
        load_config(folder)
    assert caplog.messages == []


def test_of_two_rotations_the_one_that_is_not_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    parse_config(raw("Llama", rope_scaling=linear, rope_parameters=linear))
    parse_config(raw("Llama", rope_scaling=None, rope_parameters=linear))
    assert caplog.messages == []
    parse_config(raw("Llama", rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    assert caplog.messages == ["config.json: fields that nothing reads are left out: rope_parameters"]


def test_what_nobody_reads_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"zebra_norm": 2, "attention_tweak": True, "nothing": None, "temperature": 0.7, "rope_pct": 0.5}
    yarn = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.878, "finetuned": False}
    parse_config(raw("Llama", **odd, rope_scaling=yarn), "here/config.json")
    names = "attention_tweak, rope_pct, rope_scaling.attn_factor, temperature, zebra_norm"
    assert caplog.messages == [f"here/config.json: fields that nothing reads are left out: {names}"]


# Settings of generation as transformers 4 wrote them into every config.json.
OLD_DEFAULTS: dict[str, Any] = {
    **dict(do_sample=False, early_stopping=False, remove_invalid_values=False, max_length=20, min_length=0),
    **dict(temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0, repetition_penalty=1.0, length_penalty=1.0),
    **dict(num_beams=1, num_beam_groups=1, num_return_sequences=1, diversity_penalty=0.0),
    **dict(no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0),
}


def test_old_settings_of_generation_are_named_where_they_are_not_the_defaults(caplog: pytest.LogCaptureFixture) -> None:
    parse_config(raw("Llama", **OLD_DEFAULTS))
    assert caplog.messages == []
    others = {name: not value if isinstance(value, bool) else value + 1 for name, value in OLD_DEFAULTS.items()}
    parse_config(raw("Llama", **others))
    assert caplog.messages == [f"config.json: fields that nothing reads are left out: {', '.join(sorted(others))}"]


@pytest.mark.parametrize(
    "field", ["logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_emb"]
)
def test_a_multiplier_of_one_changes_nothing(field: str) -> None:
    for value in (None, 1, 1.0):
        parse_config(raw("Llama", **{field: value}))
    for value in (2, 2.0, 0):
        assert f"{field} = {value}" in refusal(raw("Llama", **{field: value}))


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("GPT2", "rope_theta"),
        ("GPT2", "sliding_window"),
        ("Llama", "n_ctx"),
        ("Mistral", "use_sliding_window"),
        ("Phi3", "max_window_layers"),
    ],
)
def test_a_field_of_another_family_is_named(family: str, field: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_config(raw(family, **{field: 1000 if field != "use_sliding_window" else False}))
    assert caplog.messages == [f"config.json: fields that nothing reads are left out: {field}"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization", {"group_size": 64, "bits": 4}),
        ("compression_config", {"format": "pack-quantized"}),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("vision_config", {}),
        ("pruned_heads", {"0": [1]}),
        ("use_mrope", True),
        ("qk_layer_norms", True),
        ("scale_emb", 12),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_what_would_change_the_model_is_refused(field: str, value: Any) -> None:
    message = refusal(raw("Qwen2", **{field: value}))
    assert message.startswith(f"here/config.json: {field} = ")
    assert f"supported: {field} = " in message


def test_attn_factor_changes_nothing() -> None:
    """As in transformers, which computes yarn's factor from the scaling, or takes attention_factor."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain, other = (parse_config(raw("Qwen3", rope_scaling={**yarn, **more})) for more in ({}, {"attn_factor": 0.878}))
    assert plain.ropes == other.ropes
    assert other.ropes["rope"].frequencies(1)[1] == pytest.approx(1.1386294)
    given = parse_config(raw("Qwen3", rope_scaling={**yarn, "attention_factor": 1.0}))
    assert given.ropes["rope"].frequencies(1)[1] == 1.0


# --- Class names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("GPT2", "GPT2Model"), ("GPT2", "GPT2DoubleHeadsModel"), ("Llama", "LLaMAForCausalLM"), ("Llama", "LlamaModel"),
        ("Mistral", "MistralModel"), ("Qwen2", "Qwen2Model"), ("Qwen3", "Qwen3Model"), ("Phi3", "Phi3Model"),
    ],
)  # fmt: skip
def test_other_class_names_of_a_family(family: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = next(f for f in FAMILIES.values() if f.architecture.startswith(family))
    config = parse_config(raw(family, architectures=[name], model_type=ours.model_type))
    assert (config.family, config.architecture) == (ours, ours.architecture)
    assert caplog.messages == []
    assert "architectures" in refusal(raw(family, architectures=[name]))  # by itself the name says nothing


def test_a_name_of_its_own_goes_by_model_type_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_config(raw(architectures=["MyLlamaForCausalLM"], model_type="llama")).family.model_type == "llama"
    assert caplog.messages == [
        "config.json: architectures = ['MyLlamaForCausalLM'] is read as LlamaForCausalLM, by model_type"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering",
        "LlamaForRewardModel", "LlamaRewardModel", "LlamaForCausalLMEagle",
        "LlamaBidirectionalModel", "LlamaBiModel", "LlamaEncoderModel",
        "LlamaForConditionalGeneration", "LlamaMoEForCausalLM",
    ],
)  # fmt: skip
def test_other_models_of_a_family_are_refused_by_name(name: str) -> None:
    message = refusal(raw(architectures=[name], model_type="llama"))
    assert f'architectures = ["{name}"] is not supported; supported: LlamaForCausalLM for llama' in message


@pytest.mark.parametrize("given", [True, False, None, ...])
def test_a_class_without_a_head_is_tied_if_it_says_so(given: Any) -> None:
    """transformers would make up a head for a LlamaModel that does not say; GPT-2 is tied if it does not say."""
    llama = parse_config(raw(architectures=["LlamaModel"], model_type="llama", tie_word_embeddings=given))
    assert llama.tied is (given is True)
    gpt2 = parse_config(raw("GPT2", architectures=["GPT2Model"], model_type="gpt2", tie_word_embeddings=given))
    assert gpt2.tied is (given is not False)
    head = parse_config(raw("GPT2", architectures=["GPT2LMHeadModel"], tie_word_embeddings=given))
    assert head.tied is (None if given is ... else given)


@pytest.mark.parametrize("value", ["auto", "", None])
def test_a_dtype_that_says_nothing(value: str | None) -> None:
    assert parse_config(raw(torch_dtype=value)).dtype is None
    assert parse_config(raw(dtype=value, torch_dtype="torch.bfloat16")).dtype == "bfloat16"


def test_a_window_that_is_on_is_refused_for_llama() -> None:
    for switch in (True, None, ...):
        with pytest.raises(ConfigError, match="sliding_window = "):
            parse_config(raw(sliding_window=4096, use_sliding_window=switch))
    assert parse_config(json.loads(json.dumps(raw(sliding_window=4096, use_sliding_window=False)))).windows == (0, 0)
