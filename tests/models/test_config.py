"""config.json -> ModelConfig: what is read, what an absent field means, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import ConfigError
from cuplama.files import read_json
from cuplama.models import families as family_modules
from cuplama.models.config import Layer, ModelConfig, load_config, parse_config, token_ids
from cuplama.models.families import FAMILIES

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}


def raw(name: str = "Llama", **changes: Any) -> dict[str, Any]:
    """A small config of a family; a change to ``...`` leaves the field out."""
    start: dict[str, Any] = GPT2 if name == "GPT2" else {"architectures": [f"{name}ForCausalLM"], **SIZES}
    if name in ("Mistral", "Qwen2", "Qwen3"):  # whose default is a number, not that of the query heads
        start = {**start, "num_key_value_heads": None}
    return {key: value for key, value in {**start, **changes}.items() if value is not ...}


def parse(name: str = "Llama", **changes: Any) -> ModelConfig:
    return parse_config(raw(name, **changes), "here/config.json")


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(content, "here/config.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("here/config.json: ")
    return message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(number: str) -> None:
    for field in ("rms_norm_eps", "rope_theta", "partial_rotary_factor"):
        assert field in refusal(raw(**{field: json.loads(number)}))


# What is wrong -> the words that the message must hold: the field, its value, what is supported.
REFUSALS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("Llama", {"architectures": ["DbrxForCausalLM"]}, ("architectures", "DbrxForCausalLM", "GPT2LMHeadModel")),
    ("Llama", {"architectures": "LlamaForCausalLM"}, ("architectures", "MistralForCausalLM")),
    ("Llama", {"architectures": [["LlamaForCausalLM"]]}, ("architectures", "MistralForCausalLM")),
    ("Llama", {"architectures": None, "model_type": "mamba"}, ("model_type", "mamba", "supported: apertus, ", "qwen3")),
    ("Llama", {"model_type": "mixtral"}, ("model_type", "mixtral", "llama for LlamaForCausalLM")),
    ("Llama", {"architectures": None}, ("architectures", "model_type")),
    ("Llama", {"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
    ("Llama", {"hidden_act": ["silu"]}, ("hidden_act", "silu")),
    ("GPT2", {"activation_function": "relu"}, ("activation_function", "relu", "gelu_new")),
    ("Llama", {"quantization_config": {"bits": 4}}, ("quantization_config.quant_method is missing", "awq", "gptq")),
    ("Llama", {"num_local_experts": 8}, ("num_local_experts", "8", "supported")),
    ("Qwen3", {"num_experts": 128}, ("num_experts", "128", "supported")),
    ("Llama", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "50.0", "null")),
    ("Llama", {"sliding_window": 8}, ("sliding_window", "8", "null for LlamaForCausalLM")),
    ("Mistral", {"sliding_window": 1}, ("sliding_window", "1", ">= 2")),
    ("Mistral", {"sliding_window": "8"}, ("sliding_window", '"8"', ">= 2")),
    ("Mistral", {"attention_bias": True}, ("attention_bias", "true", "false")),
    ("Mistral", {"layer_types": ["full_attention"] * 2}, ("layer_types[0]", "full_attention", "sliding_attention")),
    ("Qwen2", {"layer_types": ["full_attention"]}, ("layer_types", "a list of 2")),
    ("Qwen2", {"layer_types": ["full_attention", "linear_attention"]}, ("layer_types[1]", "linear_attention")),
    ("Qwen2", {"layer_types": ["sliding_attention"] * 2}, ("layer_types[0]", "sliding_attention", "full_attention")),
    ("Qwen2", {"use_sliding_window": "no"}, ("use_sliding_window", '"no"', "true, false")),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": "all"}, ("max_window_layers", '"all"')),
    ("Llama", {"attention_bias": "false"}, ("attention_bias", '"false"', "true, false")),
    ("Llama", {"num_key_value_heads": 3}, ("num_key_value_heads", "3", "divisor", "4")),
    ("Llama", {"num_key_value_heads": 0}, ("num_key_value_heads", "0", "positive")),
    ("Llama", {"num_attention_heads": 5}, ("num_attention_heads", "5", "32")),
    ("Llama", {"head_dim": 0}, ("head_dim", "0", "positive")),
    ("Llama", {"head_dim": 7}, ("head_dim", "7", "even")),
    ("Llama", {"hidden_size": 32.0}, ("hidden_size", "32.0", "whole number")),
    ("Llama", {"hidden_size": True}, ("hidden_size", "true", "whole number")),
    ("Llama", {"vocab_size": 10**40}, ("vocab_size", "whole number")),
    ("Llama", {"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
    ("Llama", {"num_hidden_layers": None}, ("num_hidden_layers", "null")),
    ("Llama", {"num_hidden_layers": 10**9}, ("num_hidden_layers = 1000000000", "at most 10,000 layers")),
    ("GPT2", {"n_layer": 10_001}, ("n_layer = 10001", "at most 10,000 layers")),
    ("Llama", {"torch_dtype": ["a"]}, ("torch_dtype", '["a"]', "bfloat16")),
    ("Llama", {"dtype": 16}, ("dtype", "16", "bfloat16")),
    ("Llama", {"max_position_embeddings": 0}, ("max_position_embeddings", "0")),
    ("GPT2", {"n_inner": 0}, ("n_inner", "0")),
    ("Llama", {"rms_norm_eps": None}, ("rms_norm_eps", "null", "a number >= 0")),
    ("Llama", {"rms_norm_eps": -1e-5}, ("rms_norm_eps", "-1e-05")),
    ("GPT2", {"scale_attn_weights": False}, ("scale_attn_weights", "false", "true")),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx", "true")),
    ("Llama", {"eos_token_id": "2"}, ("eos_token_id", "'2'")),
    ("Llama", {"eos_token_id": [2, True]}, ("eos_token_id", "True")),
    # Rotary settings.
    ("Llama", {"rope_theta": None}, ("rope_theta", "null", "a number > 1")),
    ("Llama", {"rope_theta": 10**400}, ("rope_theta", "a number > 1")),
    ("Llama", {"rope_scaling": "linear"}, ("rope_scaling", "linear")),
    ("Llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, ("rope_scaling.rope_type", "su", "longrope")),
    ("Llama", {"rope_scaling": {"rope_type": ["linear"]}}, ("rope_scaling.rope_type", "linear", "dynamic")),
    ("Phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ("rope_type", "linear", "default, longrope")),
    ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("rope_parameters", "layer type")),
    ("Llama", {"rope_scaling": {"rope_type": "linear"}}, ("rope_scaling.factor", "missing", "linear")),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ("rope_scaling.factor", "0.5", ">= 1")),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": None}}, ("rope_scaling.factor", "null", ">= 1")),
    ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": None}}, ("rope_scaling.factor", "null", ">= 1")),
    ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, ("head_dim", "2", ">= 4")),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ("rope_scaling.factor", '"2"')),
    ("Qwen2", {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, ("mrope_section", "for default")),
    ("Llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5", "1 for llama")),
    ("Phi3", {"partial_rotary_factor": 0}, ("partial_rotary_factor", "0", "(0, 1]")),
    ("Phi3", {"partial_rotary_factor": 0.1}, ("head_dim", "0", ">= 2")),
    ("Llama", {"rope_parameters": {"rope_theta": None}, "rope_theta": 1e4}, ("rope_theta = null",)),
    ("Llama", {"original_max_position_embeddings": 0}, ("original_max_position_embeddings", "0")),
    ("Llama", {"original_max_position_embeddings": 64.5}, ("original_max_position_embeddings = 64.5", "whole number")),
    ("Llama", {"tie_word_embeddings": "false"}, ("tie_word_embeddings", '"false"', "true, false")),
]  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
REFUSALS += [
    ("Llama", {"rope_scaling": {**start, key: value}}, (f"rope_scaling.{key}", *words))
    for start, key, value, words in (
        (LLAMA3, "factor", None, ("null",)),
        (LLAMA3, "low_freq_factor", 0, ("positive",)),
        (LLAMA3, "low_freq_factor", None, ("null", "positive")),
        (LLAMA3, "high_freq_factor", 1.0, ("> low_freq_factor = 1.0",)),
        (YARN, "attention_factor", "1", ('"1"', "positive")),
        (YARN, "beta_fast", [32], ("32", ">= 0")),
        (YARN, "truncate", "yes", ('"yes"', "true, false")),
        (YARN, "low_freq_factor", 1.0, ("1.0", "beta_fast")),
        (LONG, "short_factor", [1.0] * 3, ("a list of 4",)),
        (LONG, "long_factor", [1.0, 1.0, 0, 1.0], ("a list of 4 positive numbers",)),
        (LONG, "long_factor", [1.0, 1e-300, 1.0, 1.0], ("a list of 4 positive numbers",)),
        (LONG, "long_factor", 2.0, ("2.0", "a list of 4")),
    )
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSALS, ids=lambda v: str(v)[:60])
def test_refusals_name_field_value_and_what_is_supported(
    family: str, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refusal(raw(family, **changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize("field", sorted(SIZES))
def test_missing_sizes(field: str) -> None:
    content = raw()
    del content[field]
    assert f"{field} is missing" in refusal(content)


# The defaults of an absent field that tests/golden/README.md found in transformers.
ABSENT = {
    #           KV heads  head_dim  eps  context  window
    "Llama": (4, 8, 1e-6, 2048, 0),
    "Mistral": (4, 8, 1e-6, 131072, 4096),
    "Qwen2": (4, 8, 1e-6, 32768, 0),
    "Qwen3": (4, 128, 1e-6, 32768, 0),
    "Phi3": (4, 8, 1e-5, 4096, 0),
    "GPT2": (4, 8, 1e-5, 1024, 0),
}


@pytest.mark.parametrize("family", ABSENT)
def test_defaults_of_absent_fields(family: str) -> None:
    config = parse(family)
    found = (config.num_kv_heads, config.head_dim, config.eps, config.context, max(config.windows))
    assert found == ABSENT[family]
    assert len(config.windows) == config.num_layers == 2
    assert config.activation == ("gelu_tanh" if family == "GPT2" else "silu_mul")
    assert config.intermediate_size == (128 if family == "GPT2" else 64)
    assert (config.bos, config.eos) == (None, ())
    if family == "GPT2":
        assert config.layers[0].rope is None
    else:
        assert config.layers[0].rope is not None
        assert (config.layers[0].rope.type, config.layers[0].rope.theta) == ("default", 10000.0)
        assert config.layers[0].rope.dim == config.head_dim
        assert config.layers[0].rope.original == (4096 if family == "Phi3" else config.context)


def test_kv_head_defaults_that_do_not_follow_the_query_heads() -> None:
    assert parse("Mistral", num_attention_heads=32, head_dim=8, num_key_value_heads=...).num_kv_heads == 8
    assert parse("Qwen2", num_attention_heads=64, head_dim=8, num_key_value_heads=...).num_kv_heads == 32
    assert "num_key_value_heads = 32" in refusal(raw("Qwen3", num_key_value_heads=...))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "GPT2"])
def test_model_type_stands_in_for_architectures(family: str) -> None:
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    content = raw(family, architectures=..., model_type=FAMILIES[name].model_type)
    assert parse_config(content).architecture == name


BOTH_SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    ({"rope_theta": 5e5, "rope_scaling": {}}, {"rope_parameters": {"rope_theta": 5e5}}),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4}},
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 64}},
    ),
    (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}},
        {"rope_parameters": YARN, "original_max_position_embeddings": 64.0},
    ),
    ({"rope_theta": 5e5, "rope_scaling": LONG}, {"rope_theta": 5e5, "rope_parameters": LONG}),
]


@pytest.mark.parametrize(("v4", "v5"), BOTH_SPELLINGS, ids=lambda v: next(iter(v)))
def test_both_spellings_of_rope_settings_mean_the_same(v4: dict[str, Any], v5: dict[str, Any]) -> None:
    assert parse(**v4).layers[0].rope == parse(**v5).layers[0].rope


def test_rope_precedence() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    found = parse(rope_scaling=linear, rope_parameters={"rope_type": "llama3", "rope_theta": 7.0}).layers[0].rope
    assert found is not None
    assert (found.type, found.theta) == ("linear", 10000.0)  # rope_scaling replaces rope_parameters entirely
    found = parse(rope_theta=7.0, rope_parameters={"rope_theta": 9.0}).layers[0].rope
    assert found is not None
    assert found.theta == 9.0  # the one among the settings wins
    found = parse(rope_scaling={"rope_type": "linear", "type": "dynamic", "factor": 2.0}).layers[0].rope
    assert found is not None
    assert found.type == "linear"
    found = (
        parse(original_max_position_embeddings=32, rope_scaling={**LONG, "original_max_position_embeddings": 64})
        .layers[0]
        .rope
    )
    assert found is not None
    assert found.original == 32
    found = (
        parse("Phi3", rope_scaling={**LONG, "rope_type": "su", "original_max_position_embeddings": 64}).layers[0].rope
    )
    assert found is not None
    assert (found.type, found.original) == ("longrope", 4096)


def test_windows_by_layer() -> None:
    def qwen(**changes: Any) -> tuple[int, ...]:
        return parse("Qwen2", num_hidden_layers=4, sliding_window=8, **changes).windows

    assert qwen() == (0, 0, 0, 0)
    assert qwen(use_sliding_window=True, max_window_layers=2) == (0, 0, 8, 8)
    assert qwen(use_sliding_window=True, max_window_layers=None) == (0, 0, 0, 0)  # 28
    types = ["full_attention", "sliding_attention"] * 2
    assert qwen(use_sliding_window=True, layer_types=types) == (0, 8, 0, 8)
    assert parse("Mistral", num_key_value_heads=2, sliding_window=None).windows == (0, 0)
    assert parse("Phi3", sliding_window=8).windows == (8, 8)


def test_flags_decide_which_weights_exist() -> None:
    assert parse(attention_bias=True, mlp_bias=None).flags == {"qkv_bias", "o_bias"}
    assert "0.qkv_proj.bias" in parse("Qwen2", attention_bias=False).weight_shapes()
    assert "0.o_proj.bias" not in parse("Qwen2").weight_shapes()
    shapes = parse(num_key_value_heads=2, head_dim=16).weight_shapes()
    assert shapes["1.qkv_proj"] == ((4 + 2 * 2) * 16, 32)
    assert shapes["1.o_proj"] == (32, 4 * 16)
    assert shapes["0.gate_up_proj"] == (128, 32)


def test_token_ids() -> None:
    assert token_ids(None, "x") == ()
    assert token_ids(3, "x") == (3,)
    assert token_ids(0, "x") == token_ids([-1, 0], "x") == (0,)
    assert (parse(bos_token_id=0, eos_token_id=0).bos, parse(eos_token_id=[0, 5]).eos) == (0, (0, 5))
    assert token_ids([3, -1, 4], "x") == (3, 4)  # -1 stands for none in some old files
    with pytest.raises(ConfigError, match=r"x is 1\.5"):
        token_ids(1.5, "x")


BROKEN = [
    (b"{", "not valid JSON"),
    (b"", "not valid JSON"),
    (b"[1]", "JSON list, not an object"),
    (b"\xff\xfe", "not valid JSON"),
    (b"\xef\xbb\xbf{}", "not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN, ids=lambda v: str(v[:12]))
def test_files_that_are_not_a_json_object(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_folders_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nothing is not a folder"):
        load_config(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: Is a directory"):
        load_config(tmp_path)

    def denied(*args: Any, **options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: Permission denied"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "adapter_config.json",
            "adapter_config.json is here: an adapter; give its base model to -m and this folder to",
        ),
        ("quantize.json", "quantize.json is here: the model is not finished; run the same cuplama quantize again"),
        ("merge.json", "merge.json is here: the model is not finished; run the same cuplama merge again"),
        ("params.json", "params.json is here: a checkpoint in the layout of its makers"),
        ("model-q4.gguf", "model-q4.gguf is here: a GGUF file is a model by itself; name it"),
        ("snapshots/0123/config.json", "snapshots/0123/config.json is here: give that folder"),
    ],
)
def test_what_a_folder_without_a_config_holds_instead(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"config\.json does not exist; {words}"):
        load_config(tmp_path)


def test_each_layer_has_its_own_rope_and_window() -> None:
    """As in models that mix local and global layers: one name per distinct rotation, in the order of the layers."""
    config = parse(num_hidden_layers=4)
    rope = config.layers[0].rope
    assert rope is not None
    assert (list(config.ropes), [config.rope_name(i) for i in range(4)]) == (["rope"], ["rope"] * 4)
    local = replace(rope, theta=77.0)
    mixed = replace(config, layers=(Layer(0, rope), Layer(8, local), Layer(0, None), Layer(8, rope)))
    assert mixed.ropes == {"rope": rope, "rope1": local}
    assert [mixed.rope_name(i) for i in range(4)] == ["rope", "rope1", None, "rope"]
    assert (mixed.windows, mixed.num_layers) == ((0, 8, 0, 8), 4)
    assert parse("GPT2").ropes == {}


@pytest.mark.parametrize(("given", "tied"), [(True, True), (False, False), (None, None), (..., None)])
def test_tied_heads_are_a_field(given: Any, tied: bool | None) -> None:
    config = parse(tie_word_embeddings=given)
    assert config.tied is tied
    assert (config.recipes()["lm_head"].otherwise is None) == (tied is False)


def test_families_are_found_by_being_there() -> None:
    folder = Path(family_modules.__file__).parent
    rows = [p for p in folder.glob("*.py") if "\nFAMILY = " in p.read_text(encoding="utf-8")]
    assert len({f.model_type for f in FAMILIES.values()}) == len(FAMILIES) == len(rows)
    assert all(name == family.architecture for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    ("fields", "dtype", "stored"),
    [
        ({}, None, "f32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16", "bf16"),
        ({"dtype": "float16"}, "float16", "f16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16", "f16"),
        ({"dtype": None, "torch_dtype": "float32"}, "float32", "f32"),
    ],
)
def test_the_dtype_has_two_names(fields: dict[str, Any], dtype: str | None, stored: str) -> None:
    config = parse(**fields)
    assert (config.dtype, config.stored) == (dtype, stored)


# (family, changes): the last value that is accepted, beside one of REFUSALS or OUTSIDE.
INSIDE: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"vocab_size": 2**31 - 1}),
    ("Llama", {"vocab_size": 1}),
    ("Llama", {"num_hidden_layers": 10_000}),
    ("Llama", {"rms_norm_eps": 0}),
    ("Llama", {"rms_norm_eps": 9e29}),
    ("Llama", {"rope_theta": 1.5}),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 1}}),
    ("Llama", {"rope_scaling": {**YARN, "beta_slow": 0, "mscale": 0, "truncate": False}}),
    ("Llama", {"rope_scaling": {**YARN, "factor": None, "attention_factor": None}}),
    ("Llama", {"rope_scaling": {**YARN, "attention_factor": 1.5e-30}}),
    ("Llama", {"rope_scaling": {**LONG, "long_factor": [1.5e-30] * 4}}),
    ("Llama", {"rope_scaling": LONG, "original_max_position_embeddings": 2}),
    ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 4}),
    ("Llama", {"head_dim": 2}),
    ("Llama", {"partial_rotary_factor": 1}),
    ("Llama", {"partial_rotary_factor": None}),
    ("Mistral", {"sliding_window": 2}),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
]
OUTSIDE: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"vocab_size": 2**31}, "vocab_size = 2147483648 is not a positive whole number below 2^31"),
    ("Llama", {"rms_norm_eps": 1e30}, "rms_norm_eps = 1e+30"),
    ("Llama", {"rope_theta": 1}, "rope_theta = 1 "),
    ("Llama", {"rope_theta": "2"}, 'rope_theta = "2"'),
    ("Llama", {"rope_scaling": {**YARN, "attention_factor": 1 / 1e30}}, f"attention_factor = {1 / 1e30} is"),
    ("Llama", {"rope_scaling": LONG, "original_max_position_embeddings": 1},
     "original_max_position_embeddings = 1 is not supported; supported: a whole number >= 2"),
    ("Phi3", {"partial_rotary_factor": 1.01}, "partial_rotary_factor = 1.01"),
    ("Phi3", {"partial_rotary_factor": True}, "partial_rotary_factor = true"),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), INSIDE, ids=str)
def test_the_limits_themselves_are_accepted(family: str, changes: dict[str, Any]) -> None:
    assert parse(family, **changes).family is FAMILIES[f"{family}ForCausalLM"]


@pytest.mark.parametrize(("family", "changes", "words"), OUTSIDE, ids=lambda v: str(v)[:60])
def test_what_is_just_beyond_a_limit_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(raw(family, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "su"}},
         'rope_scaling.rope_type = "su" is not supported; supported: default, linear, dynamic, llama3, yarn, longrope'),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 2},
         'layer_types[0] = "sliding_attention" is not supported; supported: full_attention for this window setting'),
        ({"num_hidden_layers": None}, "num_hidden_layers is null"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing; rope type linear needs it"),
        ({"sliding_window": 8}, "sliding_window = 8 is not supported; supported: sliding_window = null for "
                                "LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_refusals_in_full(changes: dict[str, Any], message: str) -> None:
    assert refusal(raw(num_key_value_heads=None, **changes)) == f"here/config.json: {message}"


def test_long_values_are_shown_in_part() -> None:
    """A value of up to 80 characters as it is, and of a longer one 77 and three dots."""
    for length in (80, 81):
        value = "x" * (length - 2)  # json adds quotes
        shown = f'"{value}"' if length == 80 else f'"{value}"'[:77] + "..."
        assert f"hidden_act = {shown} is not" in refusal(raw(hidden_act=value))


def test_a_part_of_each_head_may_be_rotated() -> None:
    (rope,) = parse("Phi3", head_dim=16, partial_rotary_factor=0.75).ropes.values()
    assert rope.dim == 12
    (rope,) = parse("Phi3", head_dim=16, rope_parameters={"partial_rotary_factor": 0.5}).ropes.values()
    assert rope.dim == 8


PUBLISHED = "gpt2 llama-2-7b llama-3.1-8b llama-3.2-1b mistral-7b-v0.1 phi-3-mini-4k qwen2.5-0.5b qwen3-8b"


@pytest.mark.parametrize("name", PUBLISHED.split())
def test_published_configs_are_read(shared: Path, name: str) -> None:
    assert load_config(shared / "configs" / name).num_layers >= 12
