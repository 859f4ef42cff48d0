"""Each family's row: the tensors that its checkpoints hold, as transformers names them, and its own rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cuplama.errors import ConfigError
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import ModelConfig, load_config, parse_config
from cuplama.models.export import checkpoint_tensors
from cuplama.models.families import FAMILIES
from cuplama.models.family import one
from cuplama.models.lora import Adapter, LowRank
from cuplama.ops.signature import dim_value
from tests.paths import GOLDEN

# V = 96, d = 32, f = 48, 4 query heads and 2 KV heads of 16, one layer; GPT-2: 4 heads of 8, 20 positions.
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
GPT2_SIZES = {"vocab_size": 96, "n_embd": 32, "n_inner": 48, "n_layer": 1, "n_head": 4, "n_positions": 20}

_TOP = {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32), "model.norm.weight": (32,)}
_COMMON = {
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.o_proj.weight": (32, 64),
    "mlp.down_proj.weight": (32, 48),
}
_LLAMA = {
    **_COMMON,
    "self_attn.q_proj.weight": (64, 32),
    "self_attn.k_proj.weight": (32, 32),
    "self_attn.v_proj.weight": (32, 32),
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
}
_QKV_BIAS = {"self_attn.q_proj.bias": (64,), "self_attn.k_proj.bias": (32,), "self_attn.v_proj.bias": (32,)}
_O_BIAS = {"self_attn.o_proj.bias": (32,)}
_MLP_BIAS = {"mlp.gate_proj.bias": (48,), "mlp.up_proj.bias": (48,), "mlp.down_proj.bias": (32,)}
_PHI3 = {**_COMMON, "self_attn.qkv_proj.weight": (128, 32), "mlp.gate_up_proj.weight": (96, 32)}
_QWEN3 = {**_LLAMA, "self_attn.q_norm.weight": (16,), "self_attn.k_norm.weight": (16,)}
_GPT2 = {
    "ln_1.weight": (32,), "ln_1.bias": (32,), "attn.c_attn.weight": (32, 96), "attn.c_attn.bias": (96,),
    "attn.c_proj.weight": (32, 32), "attn.c_proj.bias": (32,), "ln_2.weight": (32,), "ln_2.bias": (32,),
    "mlp.c_fc.weight": (32, 48), "mlp.c_fc.bias": (48,), "mlp.c_proj.weight": (48, 32), "mlp.c_proj.bias": (32,),
}  # fmt: skip
_GPT2_TOP = {"transformer.wte.weight": (96, 32), "lm_head.weight": (96, 32), "transformer.wpe.weight": (20, 32),
             "transformer.ln_f.weight": (32,), "transformer.ln_f.bias": (32,)}  # fmt: skip

# (family, fields beside the sizes, the tensors of its layer).
TENSORS: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("Llama", {}, _LLAMA),
    ("Llama", {"attention_bias": True}, {**_LLAMA, **_QKV_BIAS, **_O_BIAS}),
    ("Llama", {"mlp_bias": True}, {**_LLAMA, **_MLP_BIAS}),
    ("Mistral", {}, _LLAMA),
    ("Qwen2", {"attention_bias": False}, {**_LLAMA, **_QKV_BIAS}),
    ("Qwen3", {}, _QWEN3),
    ("Qwen3", {"attention_bias": True}, {**_QWEN3, **_QKV_BIAS, **_O_BIAS}),
    ("Phi3", {}, _PHI3),
    ("GPT2", {}, _GPT2),
]


def parse(family: str, **fields: Any) -> ModelConfig:
    if family == "GPT2":
        return parse_config({"architectures": ["GPT2LMHeadModel"], **GPT2_SIZES, **fields})
    return parse_config({"architectures": [f"{family}ForCausalLM"], **SIZES, **fields})


@pytest.mark.parametrize(("family", "fields", "layer"), TENSORS, ids=lambda v: str(v)[:40])
def test_the_tensors_of_a_checkpoint(family: str, fields: dict[str, Any], layer: dict[str, tuple[int, ...]]) -> None:
    config, found = parse(family, **fields), dict[str, tuple[int, ...]]()
    for recipe in config.recipes().values():
        for text, name in recipe.parts:
            shape = tuple(dim_value(d, config.dims()) for d in text.split(","))
            found[name] = shape[::-1] if recipe.transposed else shape
    top, prefix = (_GPT2_TOP, "transformer.h.0.") if family == "GPT2" else (_TOP, "model.layers.0.")
    assert found == {**top, **{prefix + name: shape for name, shape in layer.items()}}


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_queries_keys_and_values_are_stacked_in_that_order(family: str) -> None:
    recipes = parse(family, attention_bias=True, mlp_bias=None).recipes()
    for name in ("0.qkv_proj", "0.qkv_proj.bias"):
        kind = name.partition(".")[2].replace("qkv_proj", "") or ".weight"
        sources = [source for _, source in recipes[name].parts]
        assert sources == [f"model.layers.0.self_attn.{x}_proj{kind}" for x in "qkv"]
    assert [source.split(".")[-2] for _, source in recipes["0.gate_up_proj"].parts] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "GPT2"])
def test_a_tied_matrix_has_two_names(family: str) -> None:
    embedding = "transformer.wte.weight" if family == "GPT2" else "model.embed_tokens.weight"
    recipes = parse(family, tie_word_embeddings=True).recipes()
    assert (recipes["embed_tokens"].otherwise, recipes["lm_head"].otherwise) == ("lm_head.weight", embedding)


def test_names_ops_and_rotations() -> None:
    """Of each family what is not as in Llama."""
    llama = FAMILIES["LlamaForCausalLM"]
    assert (llama.embed, llama.norm, llama.rope, llama.prefix) == ("embedding", "rms_norm", "rope", "model.")
    assert llama.rope_types == ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    fields = ("embed", "norm", "rope", "prefix", "norm_offset", "rotary", "rope_types", "partial_rotary")
    found = {
        f.model_type: {field: getattr(f, field) for field in fields if getattr(f, field) != getattr(llama, field)}
        for f in FAMILIES.values()
    }
    assert {name: differences for name, differences in found.items() if differences} == {
        "cohere2": {"norm": "layer_norm", "rope": "rope_pairs"},
        "ernie4_5": {"rope": "rope_pairs"},
        "ernie4_5_moe": {"rope": "rope_pairs"},
        "gemma": {"norm_offset": 1.0},
        "gemma2": {"norm_offset": 1.0},
        "gemma3_text": {"norm_offset": 1.0},
        "gemma4_text": {"rope_types": ("default", "linear", "llama3", "yarn", "proportional")},
        "glm": {"rope": "rope_pairs", "partial_rotary": True},
        "glm4": {"rope": "rope_pairs", "partial_rotary": True},
        "glm4_moe": {"partial_rotary": True},
        "gpt2": {"embed": "embedding_pos", "norm": "layer_norm", "prefix": "transformer.", "rotary": False},
        "helium": {"rope": "rope_pairs"},
        "hunyuan_v1_dense": {"rope_types": ("default", "ntk_alpha")},
        "internlm2": {"rope_types": ("default", "linear", "dynamic")},
        "minimax_m2": {"partial_rotary": True},
        "nemotron": {"norm": "layer_norm", "norm_offset": 1.0, "partial_rotary": True},
        "phi": {"norm": "layer_norm", "partial_rotary": True},
        "phi3": {"rope_types": ("default", "longrope"), "partial_rotary": True},
        "phimoe": {"norm": "layer_norm", "rope_types": ("default", "longrope")},
        "qwen3_5_moe_text": {"norm_offset": 1.0, "partial_rotary": True},
        "qwen3_5_text": {"norm_offset": 1.0, "partial_rotary": True},
        "qwen3_next": {"norm_offset": 1.0, "partial_rotary": True},
        "stablelm": {"norm": "layer_norm", "partial_rotary": True},
        "starcoder2": {"norm": "layer_norm"},
    }


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_has_older_names_for_its_rotation(name: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    (rope,) = parse("Phi3", rope_scaling={"type": name, **factors}).ropes.values()
    assert (rope.type, rope.original) == ("longrope", 4096)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_a_window_that_is_on_has_a_default(family: str) -> None:
    """Of 4096 tokens, from layer 28 on."""
    many = parse(family, use_sliding_window=True, num_hidden_layers=30).windows
    assert many == (0,) * 28 + (4096,) * 2
    assert parse(family, num_hidden_layers=30, sliding_window=8).windows == (0,) * 30
    assert parse(family, use_sliding_window=True, max_window_layers=0, sliding_window=None).windows == (0,)


def test_windows_of_dots_begin_at_a_layer() -> None:
    """Whether ``use_sliding_window`` says so or not, of 4096 tokens from layer 62 on."""
    many = {"num_hidden_layers": 64, "use_sliding_window": False, **NEEDED["Dots1"]}
    assert parse("Dots1", **many).windows == (0,) * 62 + (4096,) * 2
    assert parse("Dots1", sliding_window=None, **many).windows == (0,) * 64
    assert parse("Dots1", sliding_window=8, max_window_layers=63, **many).windows == (0,) * 63 + (8,)


@pytest.mark.parametrize(
    ("name", "op"),
    [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_python_tanh", "gelu_tanh"),
     ("gelu_fast", "gelu_tanh"), ("gelu_accurate", "gelu_tanh"), ("gelu", "gelu_erf"), ("gelu_python", "gelu_erf")],
)  # fmt: skip
def test_gelu_is_one_of_two_functions(name: str, op: str) -> None:
    assert parse("GPT2", activation_function=name).activation == op


def test_gelu_of_gemma_is_the_tanh_formula() -> None:
    """Its first files say "gelu", which transformers corrects."""
    assert parse("Gemma", hidden_act="gelu") == parse("Gemma", hidden_act="gelu_pytorch_tanh") == parse("Gemma")
    assert parse("Gemma", hidden_act="gelu_python").activation == "gelu_erf_mul"


@pytest.mark.parametrize("name", ["silu", "swish"])
def test_silu_has_two_names(name: str) -> None:
    assert parse("Llama", hidden_act=name).activation == "silu_mul"


# Fields that would change the mathematics: (families, field, values under which they do not, values that are refused).
NEUTRAL: list[tuple[str, str, list[Any], list[Any]]] = [
    *(
        ("Llama GPT2", name, [None, False], [True, 1.5])
        for name in ("is_encoder_decoder", "add_cross_attention", "attention_sinks", "use_qk_norm", "qk_layernorm",
                     "alibi", "lm_head_bias", "rope_interleaved", "use_bidirectional_attention")
    ),
    *(("Llama", name, [None, 0, 1], [2, 8]) for name in ("num_experts", "num_local_experts")),
    *(
        ("Llama", name, [None, 0], [1, 2])
        for name in ("n_routed_experts", "num_experts_per_tok", "num_nextn_predict_layers")
    ),
    *(
        ("Llama", name, [None, 1, 1.0], [0, 0.5, 2])
        for name in ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier")
    ),
    *(
        ("Llama", name, [None], [0.5, 8, 1.0])
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv",
                     "attention_multiplier", "attention_chunk_size", "per_layer_config")
    ),
    ("Llama", "no_rope_layers", [None, []], [[1, 0]]),
    ("Llama", "is_causal", [None, True], [False]),
    ("Llama", "sliding_window", [None], [8]),
    ("Llama", "use_sliding_window", [None, False], [True]),
    ("Mistral Phi3", "attention_bias", [None, False], [True]),
    ("Mistral Phi3 Qwen2 Qwen3", "mlp_bias", [None, False], [True]),
    ("Phi3", "full_attn_mod", [None, 1], [2]),
    ("Phi3", "interpolate_factor", [None, 1], [2]),
    ("GPT2", "scale_attn_weights", [None, True], [False]),
    ("GPT2", "scale_attn_by_inverse_layer_idx", [None, False], [True]),
]  # fmt: skip


@pytest.mark.parametrize(("families", "field", "fine", "refused"), NEUTRAL, ids=lambda v: str(v)[:30])
def test_fields_that_would_change_the_mathematics(
    families: str, field: str, fine: list[Any], refused: list[Any]
) -> None:
    for family in families.split():
        for value in fine:
            assert parse(family, **{field: value}) == parse(family)
        for value in refused:
            with pytest.raises(ConfigError, match=rf"{field} = .* is not supported; supported: {field} = "):
                parse(family, **{field: value})


def test_rows_by_head_become_queries_keys_and_values() -> None:
    """Two key heads of size 2, each with two queries: the file has q q k v, q q k v."""
    recipe = one("num_heads*D+2*num_kv_heads*D", "x", by_head=True)
    dims = {"num_heads": 4, "num_kv_heads": 2, "D": 2}
    (found,) = recipe.canonical(np.arange(16), dims)
    assert found.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert recipe.stored(found, dims).tolist() == list(range(16))


def test_internlm2_goes_back_to_its_files() -> None:
    """Its matrix by head, and the B of an adapter of that."""
    folder = GOLDEN / "internlm2"
    config, tensors = load_config(folder), load_file(folder / "model.safetensors")
    arrays = {name: weight.array() for name, weight in load_weights(folder, config).items()}
    found = dict(checkpoint_tensors(config, arrays))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    adapter = Adapter({"model.layers.0.attention.wqkv": LowRank(2, 1.0)})
    recipes = replace(config, adapter=adapter).recipes()
    assert recipes["0.qkv_proj.lora_b"].by_head
    assert not recipes["0.qkv_proj.lora_a"].by_head


# What a config means that leaves fields out, of 160 heads in a hidden size of 1280, as transformers' classes have it:
# (KV heads, size of a head, eps, context, type of the rotation, its base, rotated elements). InternLM 2's are its own.
ABSENT = {
    "Apertus": (160, 8, 1e-5, 65536, "llama3", 12e6, 8),
    "Arcee": (160, 8, 1e-5, 4096, "default", 1e4, 8),
    "Cohere2": (160, 8, 1e-5, 8192, "default", 1e4, 8),
    "Dots1": (32, 8, 1e-6, 2048, "default", 1e4, 8),
    "Ernie4_5": (2, 128, 1e-5, 131072, "default", 5e5, 128),
    "Ernie4_5_Moe": (4, 8, 1e-5, 131072, "default", 5e5, 8),
    "Exaone4": (32, 8, 1e-5, 2048, "default", 1e4, 8),
    "FlexOlmo": (160, 8, 1e-6, 4096, "default", 5e5, 8),
    "Gemma": (16, 256, 1e-6, 8192, "default", 1e4, 256),
    "Gemma2": (4, 256, 1e-6, 8192, "default", 1e4, 256),
    "Gemma3": (4, 256, 1e-6, 131072, "default", 1e4, 256),
    "Glm": (2, 128, 1.5625e-7, 131072, "default", 1e4, 64),
    "Glm4": (2, 128, 1.5625e-7, 131072, "default", 1e4, 64),
    "Glm4Moe": (8, 8, 1e-5, 131072, "default", 1e4, 4),
    "GptOss": (8, 64, 1e-5, 131072, "yarn", 1.5e5, 64),
    "Granite": (160, 8, 1e-6, 2048, "default", 1e4, 8),
    "GraniteMoe": (160, 8, 1e-6, 2048, "default", 1e4, 8),
    "Helium": (20, 128, 1e-8, 4096, "default", 1e5, 128),
    "HunYuanDenseV1": (160, 8, 1e-5, 2048, "default", 1e4, 8),
    "InternLM2": (160, 8, 1e-6, 2048, "default", 1e4, 8),
    "InternLM3": (2, 128, 1e-5, 32768, "default", 1e4, 128),
    "MiniMaxM2": (8, 128, 1e-6, 196608, "default", 5e6, 128),
    "Mixtral": (8, 8, 1e-5, 131072, "default", 1e6, 8),
    "Nemotron": (160, 8, 1e-5, 4096, "default", 1e4, 4),
    "Olmo2": (160, 8, 1e-5, 2048, "default", 1e4, 8),
    "Olmo3": (160, 8, 1e-5, 2048, "default", 5e5, 8),
    "Olmoe": (160, 8, 1e-5, 4096, "default", 1e4, 8),
    "Phi": (160, 8, 1e-5, 2048, "default", 1e4, 4),
    "PhiMoE": (8, 8, 1e-5, 131072, "default", 1e6, 8),
    "Qwen2Moe": (16, 8, 1e-6, 32768, "default", 1e4, 8),
    "Qwen3Moe": (4, 8, 1e-6, 32768, "default", 1e4, 8),
    "Qwen3_5": (4, 256, 1e-6, 32768, "default", 1e4, 64),
    "Qwen3_5Moe": (2, 256, 1e-6, 32768, "default", 1e4, 64),
    "Qwen3Next": (2, 256, 1e-6, 32768, "default", 1e4, 64),
    "SeedOss": (8, 128, 1e-6, 524288, "default", 1e4, 128),
    "SmolLM3": (4, 8, 1e-6, 32768, "default", 2e6, 8),
    "StableLm": (32, 8, 1e-5, 4096, "default", 1e4, 2),
    "Starcoder2": (2, 8, 1e-5, 4096, "default", 1e4, 8),
}


# What such a config must have beside the sizes, since the family's class has no default.
NEEDED = {"Dots1": {"n_routed_experts": 9, "num_experts_per_tok": 2, "n_shared_experts": 3}}


@pytest.mark.parametrize(("family", "wanted"), ABSENT.items())
def test_what_a_config_means_that_leaves_fields_out(family: str, wanted: tuple[Any, ...]) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 1280, "intermediate_size": 48, "num_attention_heads": 160}
    raw = {"architectures": [f"{family}ForCausalLM"], **sizes, "num_hidden_layers": 4, **NEEDED.get(family, {})}
    config = parse_config(raw)
    (rope,) = config.ropes.values()
    found = (config.num_kv_heads, config.head_dim, config.eps, config.context, rope.type, rope.theta, rope.dim)
    assert found == wanted
    mixed = dict.fromkeys(("Cohere2", "Exaone4", "Olmo3"), (4096, 4096, 4096, 0))
    mixed |= {"Gemma2": (4096, 0, 4096, 0), "Gemma3": (4096,) * 4, "GptOss": (128, 0, 128, 0)}
    assert config.windows == mixed.get(family, (0,) * 4)
    tied = ("Cohere2", "Ernie4_5", "Ernie4_5_Moe", "Gemma", "Gemma2", "Gemma3", "SmolLM3", "Starcoder2")
    assert config.head_is_tied == (family in tied)
    assert config.logits_scale == (0.0625 if family == "Cohere2" else 1)
    scales = {"Gemma2": 1 / 16, "Gemma3": 1 / 16, "Granite": 1, "GraniteMoe": 1}
    assert config.attention_scale == scales.get(family, 0)
    assert (config.attention_cap, config.logits_cap) == ((50, 30) if family == "Gemma2" else (0, 0))


# Of experts: (how many, of a token, their size, that of the shared one, which of four layers have them, router).
_GLM_ROUTER = {"k": 8, "sigmoid": 1, "groups": 1, "kept": 1, "renormalise": 1, "factor": 1.0}
ABSENT_EXPERTS: dict[str, tuple[Any, ...]] = {
    "Dots1": (9, 2, 1408, 3 * 1408, [0, 1, 2, 3], {**_GLM_ROUTER, "k": 2, "renormalise": 0}),
    "Ernie4_5_Moe": (64, 6, 1536, 3072, [1, 2, 3], {"k": 6}),
    "FlexOlmo": (7, 5, 48, 0, [0, 1, 2, 3], {"k": 5, "renormalise": 0}),
    "Glm4Moe": (128, 8, 1408, 1408, [1, 2, 3], _GLM_ROUTER),
    "GraniteMoe": (8, 2, 48, 0, [0, 1, 2, 3], {"k": 2}),
    "MiniMaxM2": (256, 8, 48, 0, [0, 1, 2, 3], {"k": 8, "sigmoid": 1}),
    "Mixtral": (8, 2, 48, 0, [0, 1, 2, 3], {"k": 2}),
    "Olmoe": (64, 8, 48, 0, [0, 1, 2, 3], {"k": 8, "renormalise": 0}),
    "PhiMoE": (16, 2, 48, 0, [0, 1, 2, 3], {"k": 2, "threshold": 0.02}),
    "Qwen2Moe": (60, 4, 1408, 5632, [0, 1, 2, 3], {"k": 4, "renormalise": 0}),
    "Qwen3Moe": (128, 8, 768, 0, [0, 1, 2, 3], {"k": 8, "renormalise": 0}),
}


@pytest.mark.parametrize(("family", "wanted"), ABSENT_EXPERTS.items())
def test_what_a_config_means_that_leaves_experts_out(family: str, wanted: tuple[Any, ...]) -> None:
    config = parse(family, num_hidden_layers=4, **NEEDED.get(family, {}))
    names = config.weight_shapes()
    layers = [i for i in range(4) if f"{i}.router" in names]
    found = (config.experts, config.experts_per_token, config.expert_size, config.shared_size, layers, config.router)
    assert found == wanted
    assert [i for i in range(4) if f"{i}.down_proj" in names] == [i for i in range(4) if i not in layers]
