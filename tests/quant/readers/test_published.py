"""The settings of published checkpoints, as their config.json has them: accepted, and none of them unknown."""

from __future__ import annotations

import json

import pytest

from cuplama.errors import ConfigError
from cuplama.quant.readers import check

PUBLISHED = {
    "Qwen2.5-7B-Instruct-AWQ": """{"bits": 4, "group_size": 128, "modules_to_not_convert": null, "quant_method": "awq",
        "version": "gemm", "zero_point": true}""",
    "Qwen2.5-7B-Instruct-GPTQ-Int4": """{"bits": 4, "damp_percent": 0.01, "desc_act": false, "group_size": 128,
        "model_file_base_name": null, "model_name_or_path": null, "quant_method": "gptq", "static_groups": false,
        "sym": true, "true_sequential": true}""",
    "of transformers and optimum": """{"batch_size": 1, "bits": 4, "block_name_to_quantize": null,
        "cache_block_outputs": true, "damp_percent": 0.1, "dataset": "c4", "desc_act": false,
        "exllama_config": {"version": 1}, "group_size": 128, "max_input_length": null, "model_seqlen": 4096,
        "module_name_preceding_first_block": ["model.embed_tokens"], "modules_in_block_to_quantize": null,
        "pad_token_id": null, "quant_method": "gptq", "sym": true, "tokenizer": null, "true_sequential": true,
        "use_cuda_fp16": false, "use_exllama": true}""",
    "of GPTQModel": """{"bits": 4, "checkpoint_format": "gptq", "desc_act": true, "dynamic": null, "group_size": 32,
        "lm_head": false, "meta": {"damp_percent": 0.01, "quantizer": ["gptqmodel:1.4.5"]}, "pack_dtype": "int32",
        "quant_method": "gptq", "sym": true}""",
    "quantized.w4a16 of RedHatAI": """{"config_groups": {"group_0": {"input_activations": null,
        "output_activations": null, "targets": ["Linear"], "weights": {"actorder": "weight", "block_structure": null,
        "dynamic": false, "group_size": 128, "num_bits": 4, "observer": "mse", "observer_kwargs": {},
        "strategy": "group", "symmetric": true, "type": "int"}}}, "format": "pack-quantized",
        "global_compression_ratio": 1.89, "ignore": ["lm_head"], "kv_cache_scheme": null,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config":
        {"format": "dense", "global_sparsity": 0.126, "ignore": [], "registry_requires_subclass": false,
        "sparsity_structure": "unstructured", "targets": []}}""",
    "FP8-dynamic of RedHatAI": """{"config_groups": {"group_0": {"input_activations": {"actorder": null,
        "block_structure": null, "dynamic": true, "group_size": null, "num_bits": 8, "observer": null,
        "observer_kwargs": {}, "strategy": "token", "symmetric": true, "type": "float"}, "output_activations": null,
        "targets": ["Linear"], "weights": {"actorder": null, "block_structure": null, "dynamic": false,
        "group_size": null, "num_bits": 8, "observer": "minmax", "observer_kwargs": {}, "strategy": "channel",
        "symmetric": true, "type": "float"}}}, "format": "float-quantized", "global_compression_ratio": 1.46,
        "ignore": ["lm_head"], "kv_cache_scheme": null, "quant_method": "compressed-tensors",
        "quantization_status": "compressed"}""",
    "Meta-Llama-3-8B-Instruct-FP8": """{"activation_scheme": "static", "ignored_layers": ["lm_head"],
        "kv_cache_scheme": null, "quant_method": "fp8"}""",
    "Qwen3-8B-FP8": """{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "model.norm"]}""",
    "static of Mistral": """{"activation_scheme": "static", "dequantize": false, "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8", "weight_block_size": null}""",
    "Llama-3.1-405B-Instruct-FP8": """{"activation_scale_ub": 1200.0, "modules_to_not_convert":
        ["model.layers.0.self_attn.q_proj"], "quant_method": "fbgemm_fp8"}""",
    "gpt-oss-20b": """{"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
        "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}""",
    "bnb-4bit of unsloth": """{"_load_in_4bit": true, "_load_in_8bit": false, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true,
        "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false, "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0, "load_in_4bit": true, "load_in_8bit": false, "quant_method": "bitsandbytes"}""",
    "bitsandbytes before there were methods": """{"bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": false, "load_in_4bit": true, "load_in_8bit": false}""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_known(name: str) -> None:
    assert check(json.loads(PUBLISHED[name]), "config.json") == []


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ([], "quantization_config is not an object of settings"),
        ("int4", "quantization_config is not an object of settings"),
        ({}, "quantization_config.quant_method is missing; supported: awq, bitsandbytes, compressed-tensors, fp8,"),
        ({"bits": 4, "group_size": 64}, "quantization_config.quant_method is missing; supported: awq"),
        ({"quant_method": "hqq"}, 'quantization_config.quant_method is "hqq"; supported: awq'),
        ({"quant_method": 4}, "quantization_config.quant_method is 4; supported: awq"),
        ({"quant_method": ["awq"] * 30}, 'quantization_config.quant_method is ["awq", "awq", '),
    ],
)
def test_settings_of_nobody(raw: object, line: str) -> None:
    with pytest.raises(ConfigError) as e:
        check(raw, "config.json")
    assert str(e.value).startswith(f"config.json: {line}")
    assert len(str(e.value)) < 250
