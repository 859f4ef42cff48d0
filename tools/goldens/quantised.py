"""The quantised golden models: a row per case, with its settings and what packs its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tools.goldens.case import SMALL, Config, rope
from tools.goldens.cases import GPT2
from tools.goldens.packers import pack_awq, pack_bitsandbytes, pack_compressed, pack_fp8, pack_gptq, pack_mxfp4

__all__ = ["CASES", "Case", "Pack", "Settings"]

Settings = Mapping[str, Any]
# (module, weight float32 [out, in], settings, case options) -> (tensors by the ends of their names, float32 numbers).
Pack = Callable[[str, torch.Tensor, Settings], tuple[dict[str, torch.Tensor], torch.Tensor]]

WIDE: Config = {
    **SMALL,
    **rope("default", 500000.0),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
# Less than 300 kB of 8-bit numbers, and 128 divides most sizes.
SMALLER: Config = {**WIDE, "head_dim": 32, "tie_word_embeddings": True}
TINY: Config = {**WIDE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
# Experts whose rows are no whole number of blocks of 16, or are.
GPT_OSS: Config = {
    **TINY,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "swiglu_limit": 1.5,
    **rope("yarn", 150000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
           original_max_position_embeddings=32),
}  # fmt: skip
QWEN_MOE: Config = {
    **TINY,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
# 128 divides neither of these sizes.
RAGGED: Config = {**WIDE, "hidden_size": 96, "intermediate_size": 144, "head_dim": 48}


@dataclass(frozen=True)
class Case:
    """One quantised model.

    family, base: of the model; settings: its quantization_config; pack: what makes the tensors of a matrix; plain:
    modules that stay as they are; dtype: of all other tensors; head: whether the head is quantised too; experts_only:
    whether experts are and nothing else.
    """

    settings: Settings
    pack: Pack
    family: str = "llama"
    base: Config = field(default_factory=lambda: WIDE)
    plain: Sequence[str] = ()
    dtype: torch.dtype = torch.bfloat16
    head: bool = False
    experts_only: bool = False


def compressed(form: str, *groups: Settings, ignore: Sequence[str] = ("lm_head",), **more: Any) -> Settings:
    """A quantization_config of compressed-tensors. groups: QuantizationSchemes, by their fields."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "quantization_status": "compressed",
        **more,
    }


def group(bits: int, strategy: str, kind: str = "int", targets: Sequence[str] = ("Linear",), **more: Any) -> Settings:
    """A config_group whose activations are not quantised. more: of the weights, but for activations and format."""
    outer: dict[str, Any] = {key: more.pop(key) for key in ("input_activations", "format") if key in more}
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, **more}
    return {"targets": list(targets), "weights": weights, **outer}


TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

CASES: dict[str, Case] = {
    "ct-w4a16": Case(
        compressed("pack-quantized", group(4, "group", group_size=128)),
        pack_compressed,
        base={**WIDE, "intermediate_size": 128},
    ),
    "ct-w4a16-asymmetric": Case(
        compressed("pack-quantized", group(4, "group", group_size=32, symmetric=False)), pack_compressed, "qwen3", TINY
    ),
    "ct-w4a16-act-order": Case(
        compressed("pack-quantized", group(4, "group", group_size=64, actorder="group")), pack_compressed, base=TINY
    ),
    "ct-w4a16-channel-asymmetric": Case(
        compressed("pack-quantized", group(4, "channel", symmetric=False)), pack_compressed, base=RAGGED
    ),
    "ct-w8a16": Case(
        compressed("pack-quantized", group(8, "channel", targets=["Linear", "Embedding"]), ignore=()),
        pack_compressed,
        base=TINY,
        head=True,
    ),
    "ct-w8a8": Case(
        compressed("int-quantized", group(8, "channel", input_activations=TOKENS)), pack_compressed, "qwen2", TINY
    ),
    "ct-fp8-dynamic": Case(
        compressed("float-quantized", group(8, "channel", "float", input_activations={**TOKENS, "type": "float"})),
        pack_compressed,
        base=TINY,
    ),
    "ct-fp8-static": Case(
        compressed(
            "float-quantized",
            group(8, "tensor", "float", input_activations={"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ),
        pack_compressed,
        base=TINY,
    ),
    "ct-fp8-block": Case(
        compressed(
            "float-quantized",
            group(
                8,
                "block",
                "float",
                block_structure=[128, 128],
                input_activations={**TOKENS, "type": "float", "strategy": "group", "group_size": 128},
            ),
        ),
        pack_compressed,
        base=RAGGED,
    ),
    "ct-mixed": Case(
        compressed(
            "mixed-precision",
            group(4, "group", group_size=32, format="pack-quantized", targets=["re:.*self_attn.*_proj$"]),
            group(8, "channel", "float", format="float-quantized", targets=["re:.*(gate|up)_proj$"],
                  input_activations={**TOKENS, "type": "float"}),
            group(8, "tensor", format="int-quantized", targets=["Linear"], input_activations=TOKENS),
            ignore=["lm_head", "re:.*0.self_attn.q_proj"],
        ),
        pack_compressed,
        base=TINY,
        plain=["model.layers.0.self_attn.q_proj"],
    ),
    "fp8-block": Case(FP8, pack_fp8, base=SMALLER),
    "fp8-block-ragged": Case(
        {**FP8, "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"]},
        pack_fp8,
        "qwen3",
        RAGGED,
        plain=["model.layers.1.mlp.down_proj"],
    ),
    "fp8-static": Case({**FP8, "activation_scheme": "static", "weight_block_size": None}, pack_fp8, "mistral", TINY),
    "gptq": Case({**GPTQ, "group_size": 128, "checkpoint_format": "gptq"}, pack_gptq, dtype=torch.float16),
    "gptq-act-order": Case({**GPTQ, "sym": False, "desc_act": True}, pack_gptq, base=TINY, dtype=torch.float16),
    # Modules whose weights lie [in, out] when they are plain.
    "gptq-gpt2": Case(GPTQ, pack_gptq, "gpt2", GPT2, dtype=torch.float16),
    "gptq-v2-w8": Case(
        {**GPTQ, "bits": 8, "sym": False, "group_size": -1, "checkpoint_format": "gptq_v2", "lm_head": True},
        pack_gptq,
        "qwen2",
        RAGGED,
        dtype=torch.float16,
        head=True,
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        pack_awq,
        "qwen2",
        TINY,
        dtype=torch.float16,
    ),
    "mxfp4": Case(
        {"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        pack_mxfp4,
        "gpt_oss",
        GPT_OSS,
        experts_only=True,
    ),
    "awq-experts": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        pack_awq,
        "qwen3_moe",
        {**QWEN_MOE, "moe_intermediate_size": 64},
        dtype=torch.float16,
    ),
    "gptq-experts": Case(
        {**GPTQ, "checkpoint_format": "gptq"},
        pack_gptq,
        "qwen3_moe",
        {**QWEN_MOE, "moe_intermediate_size": 32},
        dtype=torch.float16,
    ),
    "fp8-block-experts": Case(FP8, pack_fp8, "qwen3_moe", {**QWEN_MOE, "moe_intermediate_size": 40}),
    "nf4": Case(NF4, pack_bitsandbytes, base=TINY),
    "nf4-double": Case({**NF4, "bnb_4bit_use_double_quant": True}, pack_bitsandbytes, "phi3", TINY),
    "llm-int8": Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, pack_bitsandbytes, base=TINY
    ),
}  # fmt: skip
