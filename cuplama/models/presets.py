"""The shapes of well-known models, as their published config.json states them: enough to measure without a download.

The facts that a run depends on, and no more; text, tokenizer and weights are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..gguf import is_gguf
from .config import ModelConfig, load_config, parse_config

__all__ = ["SHAPES", "find_shape", "is_shape"]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


_QWEN3_5 = {
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _shape(
    architecture: str,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    theta: float,
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "gemma-4-e4b": {
        "architectures": ["Gemma4ForCausalLM"],
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-20b": _shape(
        "GptOss", 2880, 2880, 24, 64, 8, 201088, 131072, 150000.0,
        head_dim=64, num_local_experts=32, num_experts_per_tok=4, attention_bias=True, sliding_window=128,
        rope_scaling={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": _shape("Llama", 4096, 11008, 32, 32, 32, 32000, 4096, 1e4, torch_dtype="float16"),
    "llama-3.1-8b": _shape(
        "Llama", 4096, 14336, 32, 32, 8, 128256, 131072, 5e5, rope_scaling={**_LLAMA3_ROPE, "factor": 8.0}
    ),
    "llama-3.2-1b": _shape(
        "Llama", 2048, 8192, 16, 32, 8, 128256, 131072, 5e5,
        rope_scaling={**_LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True,
    ),
    "mistral-7b-v0.1": _shape("Mistral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e4, sliding_window=4096),
    "mixtral-8x7b": _shape("Mixtral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e6, num_local_experts=8),
    "phi-3-mini-4k": _shape(
        "Phi3", 3072, 8192, 32, 32, 32, 32064, 4096, 1e4, sliding_window=2047, original_max_position_embeddings=4096
    ),
    "qwen2.5-0.5b": _shape(
        "Qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e6, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "qwen3.6-27b": {
        **_QWEN3_5,
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
    },
    "qwen3.6-35b-a3b": {
        **_QWEN3_5,
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 32,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3-30b-a3b": _shape(
        "Qwen3Moe", 2048, 6144, 48, 32, 4, 151936, 40960, 1e6,
        rms_norm_eps=1e-6, head_dim=128, num_experts=128, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "qwen3-8b": _shape("Qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, 1e6, rms_norm_eps=1e-6, head_dim=128),
}  # fmt: skip


def is_shape(model: str | None) -> bool:
    """Whether a model's name means a shape without weights. A folder of that name comes first."""
    return model is not None and model in SHAPES and not Path(model).exists()


def find_shape(model: str) -> tuple[str, ModelConfig]:
    """(name, config) of a folder with a config.json, of a GGUF file, or of a name in ``SHAPES``. Reads no weights.

    Raises ConfigError listing the names.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or is_gguf(folder):
        return folder.resolve().name, load_config(folder)
    if model in SHAPES:
        return model, parse_config(SHAPES[model], model)
    raise ConfigError(
        f"{model!r:.200} is neither a folder with a config.json, nor a GGUF file, nor one of the known shapes:"
        f" {', '.join(SHAPES)}"
    )
