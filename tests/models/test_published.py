"""config.json of published models: they are read without a warning, and their weights are as many as was published.

tests/data/configs has them, written down by hand: the fields that decide the model, some without what no program reads.
"""

from __future__ import annotations

import logging

import pytest

from cuplama.errors import ConfigError
from cuplama.files import read_json
from cuplama.models.config import ModelConfig, parse_config
from cuplama.models.graph import decoder
from tests.paths import DATA


def ahead(d: int, experts: int, size: int, norms: int) -> int:
    """Parameters of the further layer of GLM-4.5, which predicts one more token and is left out."""
    attention = d * (2 * 96 + 2 * 8) * 128 + (96 + 2 * 8) * 128 + norms
    mixture = (experts + 1) * 3 * d * size + experts * (d + 1)
    return attention + mixture + 2 * d + 3 * d + 2 * d * d + 2 * 151552 * d


GLM_AHEAD, GLM_AIR_AHEAD = ahead(5120, 160, 1536, 2 * 128), ahead(4096, 128, 1408, 0)
# Parameters as the hub counts them, or as the makers round them where that is a float. Of models of text and more, the
# text part: the whole without the vision tower and what projects its outcome.
PARAMETERS: dict[str, int | float] = {
    "afm-4.5b": 4.62e9,
    "apertus-70b": 70.6e9,
    "apertus-8b": 8.05e9,
    "command-a": 111_057_580_032,
    "command-r7b": 8_028_033_024,
    "deepseek-llm-7b": 6_910_365_696,
    "dots.llm1": 142_774_381_696,
    "ernie-4.5-0.3b": 360_748_032,
    "ernie-4.5-21b-a3b": 21.8e9,
    "ernie-4.5-300b-a47b": 300e9,
    "exaone-4.0-1.2b": 1.28e9,
    "exaone-4.0-32b": 32.0e9,
    "falcon3-7b": 7_455_550_464,
    # OLMo 2 7B with the MLPs of six more in each layer, and routers.
    "flexolmo-7x7b": 7_298_617_344 + 32 * (6 * 3 * 4096 * 11008 + 7 * 4096),
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "gemma-3-27b": 27_432_406_640 - 423_060_336,
    "gemma-3-4b": 4_300_079_472 - 419_816_304,
    # As GGUF files count them, less keys and values of layers that share those of others: files have them all the same.
    "gemma-4-26b-a4b": 25.2e9,
    "gemma-4-31b": 30.7e9,
    "gemma-4-e2b": 4.65e9 - 18_882_560,
    "gemma-4-e4b": 7.52e9 - 55_070_720,
    "gemma-7b": 8_537_680_896,
    "glm-4-32b-0414": 32_566_081_536,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4-9b-chat": 9_399_951_360,
    "glm-4-9b-chat-1m": 9_483_857_920,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "glm-4.5": 358_337_791_296 - GLM_AHEAD,
    "glm-4.5-air": 110_468_824_832 - GLM_AIR_AHEAD,
    "granite-3.1-1b-a400m": 1_334_628_352,
    "granite-3.1-3b-a800m": 3_298_793_472,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4.0-1b": 1_631_750_144,
    "granite-4.0-micro": 3_402_836_480,
    "helium-1-2b": 2.02e9,
    "helium-1-preview-2b": 2_172_643_840,
    "hunyuan-1.8b": 1.79e9,
    "hunyuan-7b": 7.50e9,
    "internlm2.5-1.8b": 1_889_110_016,
    "internlm2.5-7b": 7_737_708_544,
    "internlm3-8b": 8_804_241_408,
    "minimax-m2": 228_703_644_928 - 13_880_064,  # less the scales of its fp8 matrices
    "ministral-3-14b": 13.5e9,
    "ministral-3-3b": 3_849_090_048 - 420_083_712,
    "minitron-4b": 4.19e9,
    "minitron-8b": 8.27e9,
    "mistral-small-3.1-24b": 23_572_403_200,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-32b": 32_234_279_936,
    "olmo-2-7b": 7_298_617_344,
    "olmo-3-32b": 32_233_522_176,
    "olmo-3-7b": 7_298_011_136,
    "olmoe-1b-7b-0125": 6_919_161_856,
    "olmoe-1b-7b-0924": 6_919_161_856,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3.5-moe": 41_873_153_344,
    "phi-mini-moe": 7.65e9,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57.4e9,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    # As GGUF files count them.
    "qwen3.5-0.8b": 0.75239e9,
    "qwen3.5-9b": 8.95e9,
    "qwen3.6-27b": 26.9e9,
    "qwen3.6-35b-a3b": 34.66e9,
    "qwen3-next-80b-a3b": 79.67e9,
    "seed-oss-36b": 36_151_104_512,
    "smollm3-3b": 3_075_098_624,
    "smollm3-3b-base": 3_075_098_624,
    "stablelm-2-1.6b": 1_644_515_328,
    "stablelm-3b": 2_795_443_200,
    "starcoder2-15b": 15_957_889_024,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "yi-6b": 6_061_035_520,
}


def published(name: str) -> ModelConfig:
    return parse_config(read_json(DATA / "configs" / f"{name}.json"), name)


def test_every_file_has_a_count() -> None:
    assert sorted(p.stem for p in (DATA / "configs").glob("*.json")) == sorted(PARAMETERS)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters(name: str, count: int | float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = published(name)
    assert not caplog.messages
    found = config.parameters(config.head_is_tied)
    assert found == count if isinstance(count, int) else abs(found / count - 1) < 0.004
    assert len(decoder(config).body) > 6 * config.num_layers


# Parameters that a token uses, as the makers round them.
ACTIVE = {
    "dots.llm1": 14e9,
    "ernie-4.5-21b-a3b": 3e9,
    "ernie-4.5-300b-a47b": 47e9,
    "gemma-4-26b-a4b": 3.8e9,
    "glm-4.5": 32e9,
    "glm-4.5-air": 12e9,
    "granite-3.1-1b-a400m": 400e6,
    "granite-3.1-3b-a800m": 800e6,
    "minimax-m2": 10e9,
    "mixtral-8x22b": 39e9,
    "mixtral-8x7b": 13e9,
    "olmoe-1b-7b-0924": 1.3e9,
    "phi-3.5-moe": 6.6e9,
    "phi-mini-moe": 2.4e9,
    "qwen1.5-moe-a2.7b": 2.7e9,
    "qwen2-57b-a14b": 14e9,
    "qwen3-235b-a22b": 22e9,
    "qwen3-30b-a3b": 3.3e9,
}


@pytest.mark.parametrize(("name", "count"), ACTIVE.items())
def test_active_parameters(name: str, count: float) -> None:
    """Some makers leave embedding and head out."""
    config = published(name)
    found = config.parameters(config.head_is_tied, active=True)
    assert found - 2 * config.vocab_size * config.hidden_size < 1.04 * count
    assert found > 0.97 * count


def test_layers_of_two_kinds() -> None:
    """Three of four have a window and rotate; EXAONE without windows and Hunyuan rotate everywhere."""
    for name, theta in (("command-r7b", 50000), ("exaone-4.0-32b", 1e6)):
        config = published(name)
        assert config.windows == (4096, 4096, 4096, 0) * (config.num_layers // 4)
        assert [layer.rope is None for layer in config.layers] == [window == 0 for window in config.windows]
        assert [rope.theta for rope in config.ropes.values()] == [theta]
    everywhere = published("exaone-4.0-1.2b")
    assert not any(everywhere.windows)
    assert all(layer.rope for layer in everywhere.layers)


def test_gemma_3_has_a_rotation_for_windows() -> None:
    for name, window, settings in (("gemma-3-4b", 1024, {"factor": 8.0}), ("gemma-3-1b", 512, {})):
        config = published(name)
        assert config.windows == tuple(0 if (i + 1) % 6 == 0 else window for i in range(config.num_layers))
        local, whole = config.ropes.values()
        assert (local.theta, local.type, whole.theta, whole.settings) == (1e4, "default", 1e6, settings)
        assert [config.rope_name(i) for i in range(6)] == ["rope"] * 5 + ["rope1"]
    assert published("gemma-3-27b").attention_scale == 168**-0.5
    assert published("gemma-3-4b").embedding_scale == 2560**0.5


def test_olmo_3_scales_full_attention_alone() -> None:
    config = published("olmo-3-7b")
    assert config.windows == (4096, 4096, 4096, 0) * 8
    local, whole = config.ropes.values()
    assert (local.type, local.theta, whole.type, whole.theta) == ("default", 5e5, "yarn", 5e5)
    assert whole.frequencies(1)[1] == 1.2079441541679836


def test_smollm_3_leaves_every_fourth_layer_unrotated() -> None:
    config = published("smollm3-3b")
    assert [layer.rope is None for layer in config.layers] == [False, False, False, True] * 9
    assert not any(config.windows)


def test_numbers_of_published_models() -> None:
    """Granite's multipliers, Gemma's soft limits, Ministral's temperature: (model, field, value)."""
    found = [
        ("granite-3.3-8b", "attention_scale", 0.0078125), ("granite-3.3-8b", "logits_scale", 1 / 16),
        ("granite-3.3-8b", "embedding_scale", 12.0), ("granite-4.0-micro", "residual_scale", 0.22),
        ("gemma-2-27b", "attention_scale", 1 / 12), ("gemma-2-2b", "attention_cap", 50.0),
        ("gemma-2-2b", "logits_cap", 30.0), ("gemma-3-4b", "logits_cap", 0.0),
        ("ministral-3-3b", "query_temperature", 0.1), ("ministral-3-3b", "query_context", 16384.0),
        ("mistral-small-3.1-24b", "query_temperature", 0.0),
    ]  # fmt: skip
    assert [(name, field, getattr(published(name), field)) for name, field, _ in found] == found


# The ops of the second layer, in order, without what every layer has.
LAYERS = {
    "gemma-7b": "rms_norm rope add rms_norm gelu_tanh_mul add",
    "gemma-2-2b": "rms_norm rope rms_norm_add rms_norm gelu_tanh_mul rms_norm_add",
    "gemma-3-4b": "rms_norm qk_norm rope rms_norm_add rms_norm gelu_tanh_mul rms_norm_add",
    "olmo-2-7b": "cast qk_norm_wide rope rms_norm_add cast silu_mul rms_norm_add",
    "granite-3.3-8b": "rms_norm rope add rms_norm silu_mul add",
    "glm-4-9b-chat": "rms_norm rope_pairs add rms_norm silu_mul add",
    "glm-4-9b-0414": "rms_norm rope_pairs rms_norm_add rms_norm silu_mul rms_norm_add",
    "ministral-3-3b": "rms_norm rope scale_queries add rms_norm silu_mul add",
}


@pytest.mark.parametrize(("name", "ops"), LAYERS.items())
def test_layers(name: str, ops: str) -> None:
    graph = decoder(published(name))
    body = list(graph.body)
    first, last = (next(i for i, node in enumerate(body) if stream in node.outs) for stream in graph.streams[1:3])
    common = ("linear", "kv_append", "attention")
    assert " ".join(node.op for node in body[first + 1 : last + 1] if node.op not in common) == ops


PARTS = [
    ("glm-4-9b-0414", 64),
    ("glm-4-32b-0414", 64),
    ("glm-4-9b-chat", 64),
    ("phi-2", 32),
    ("phi-1.5", 32),
    ("stablelm-3b", 20),
    ("minitron-4b", 64),
    ("minimax-m2", 64),
]  # of 128, 128, 128, 80, 64, 80, 128 and 128


@pytest.mark.parametrize(("name", "rotated"), PARTS)
def test_a_part_of_a_head_rotates(name: str, rotated: int) -> None:
    assert [rope.dim for rope in published(name).ropes.values()] == [rotated]


def test_gemma_4_has_layers_of_several_kinds() -> None:
    """Heads of 512 in every fifth or sixth layer; the last layers of the small ones have no keys and values."""
    for name, period, own in (("gemma-4-31b", 6, 60), ("gemma-4-e4b", 6, 24), ("gemma-4-e2b", 5, 15)):
        config = published(name)
        whole = [(i + 1) % period == 0 for i in range(config.num_layers)]
        assert [window == 0 for window in config.windows] == whole
        assert [config.dims(f"{i}.")["D"] for i in range(config.num_layers)] == [512 if w else 256 for w in whole]
        assert [*config.caches] == [*range(own)]
        sources = [layer.kv_layer for layer in config.layers[own:]]
        assert sources == [own - 1 if w else own - 2 for w in whole[own:]]
        assert [(r.type, r.theta, r.dim) for r in config.ropes.values()] == [
            ("default", 1e4, 256),
            ("proportional", 1e6, 512),
        ]
    large = published("gemma-4-31b")
    assert (large.caches[0], large.caches[5], large.kv_size) == ((16, 256), (4, 512), 50 * 8192 + 10 * 4096)
    assert len(large.unused_tensors()) == 10  # the matrices of values that are the keys'
    small = published("gemma-4-e2b")
    assert [small.dims(f"{i}.")["f"] for i in (14, 15)] == [6144, 12288]
    assert len(small.unused_tensors()) == 20 * 3


def test_gpt_oss_has_sinks_and_a_window_in_every_second_layer() -> None:
    config = published("gpt-oss-20b")
    assert config.windows == (128, 0) * 12
    (rope,) = config.ropes.values()
    assert (rope.type, rope.theta, rope.settings["truncate"]) == ("yarn", 150000, False)
    assert (config.swiglu_alpha, config.swiglu_limit, config.experts_per_token) == (1.702, 7.0, 4)
    assert config.weight_shapes()["0.sinks"] == (64,)
    products = [node for node in decoder(config).body if node.op.startswith("expert_linear")]
    assert products[0].attrs == {"alpha": 1.702, "limit": 7.0}
    assert config.parameters(False, active=True) - 201088 * 2880 == 3_608_307_264  # 3.61 billion, without embedding


# What these families may ask for and is not there: (model, field, value that is refused).
REFUSED = [
    ("gemma-2b", "hidden_activation", "gelu"),
    ("gemma-2b", "query_pre_attn_scalar", 256),
    ("gemma-2-2b", "use_bidirectional_attention", True),
    ("gemma-2-2b", "hidden_activation", "relu"),
    ("gemma-3-1b", "attn_logit_softcapping", 50.0),
    ("gpt-oss-20b", "attention_bias", False),
    ("gpt-oss-20b", "hidden_act", "gelu"),
    ("gpt-oss-20b", "swiglu_limit", 0),
    ("granite-4.0-micro", "num_local_experts", 62),
    ("gemma-3-1b", "rope_parameters", {"rope_type": "default"}),
    ("smollm3-3b", "no_rope_layers", [1, 0]),
    ("qwen3-next-80b-a3b", "use_sliding_window", True),
    ("qwen3-next-80b-a3b", "attention_bias", True),
    ("stablelm-2-1.6b", "use_parallel_residual", True),
    ("stablelm-2-1.6b", "qk_layernorm", True),
    ("phi-2", "qk_layernorm", True),
    ("command-r7b", "use_parallel_block", False),
    ("command-r7b", "use_qk_norm", True),
    ("command-r7b", "position_embedding_type", "alibi"),
    ("hunyuan-7b", "use_cla", True),
    ("hunyuan-7b", "use_qk_norm", False),
    ("apertus-8b", "post_norm", True),
    ("exaone-4.0-32b", "sliding_window_pattern", 0),
    ("starcoder2-3b", "mlp_type", "gated"),
    ("starcoder2-3b", "norm_type", "rms_norm"),
    ("starcoder2-3b", "use_bias", "yes"),
    ("minimax-m2", "attn_type_list", [0] + [1] * 61),
    ("minimax-m2", "rotary_dim", "64"),
    ("minimax-m2", "scoring_func", "softmax"),
    ("minimax-m2", "use_routing_bias", False),
    ("minimax-m2", "qk_norm_type", "per_head"),
    ("minimax-m2", "shared_intermediate_size", 1536),
    ("minimax-m2", "layernorm_mlp_beta", 3.5),
    ("dots.llm1", "scoring_func", "softmax"),
    ("dots.llm1", "moe_layer_freq", 2),
    ("dots.llm1", "n_shared_experts", None),
    ("flexolmo-7x7b", "clip_qkv", 8.0),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_what_is_not_there_is_refused_by_name(name: str, field: str, value: object) -> None:
    raw = {**read_json(DATA / "configs" / f"{name}.json"), field: value}
    raw.pop("layer_types", None)
    with pytest.raises(ConfigError, match=f"^config.json: .*{field}"):
        parse_config(raw)


WRAPPED_REFUSED = [
    ("gemma-4-e4b", "use_bidirectional_attention", "all"),
    ("gemma-4-e4b", "num_kv_shared_layers", 42),  # all of them
    ("gemma-4-e4b", "num_kv_shared_layers", 37),  # so that no layer before them is without a window
    ("gemma-4-e4b", "num_kv_shared_layers", "18"),
    ("gemma-4-31b", "num_kv_shared_layers", -1),
    ("gemma-4-31b", "per_layer_config", {"5": {"hidden_size": 9}}),
    ("gemma-4-31b", "per_layer_config", {"5": {"head_dim": 0}}),
    ("gemma-4-31b", "num_global_key_value_heads", 5),
    ("gemma-4-31b", "hidden_size_per_layer_input", "256"),
    ("qwen3.6-27b", "attention_bias", True),
    ("qwen3.6-27b", "attn_output_gate", False),
    ("qwen3.6-27b", "output_gate_type", "sigmoid"),
    ("qwen3.6-27b", "linear_num_value_heads", 50),
    ("qwen3.6-27b", "linear_conv_kernel_dim", "4"),
    ("qwen3.6-27b", "mlp_only_layers", [3]),
]


@pytest.mark.parametrize(("name", "field", "value"), WRAPPED_REFUSED)
def test_what_a_layer_cannot_be_is_refused_by_name(name: str, field: str, value: object) -> None:
    raw = read_json(DATA / "configs" / f"{name}.json")
    raw["text_config"][field] = value
    with pytest.raises(ConfigError, match=rf"^config.json: text_config\..*{field}"):
        parse_config(raw)


def test_qwen_3_5_has_attention_in_every_fourth_layer() -> None:
    for name in ("qwen3-next-80b-a3b", "qwen3.6-35b-a3b", "qwen3.5-0.8b", "qwen3.5-9b", "qwen3.6-27b"):
        config = published(name)
        assert list(config.caches) == list(range(3, config.num_layers, 4))
        assert len(config.delta_layers) == 3 * config.num_layers // 4
        (rope,) = config.ropes.values()
        assert (rope.theta, rope.dim, rope.type) == (1e7, 64, "default")
    assert config.state_shapes == ((3, 10240), (48, 128, 128))
    active = {name: published(name).parameters(False, active=True) for name in PARAMETERS if name.endswith("a3b")}
    assert (active["qwen3.6-35b-a3b"], active["qwen3-next-80b-a3b"]) == (3_454_988_928, 3_874_929_408)


def test_hunyuan_stretches_its_base() -> None:
    (rope,) = published("hunyuan-7b").ropes.values()
    frequencies, factor = rope.frequencies(1)
    assert factor == 1
    assert frequencies[1] == pytest.approx((10000 * 1000 ** (128 / 126)) ** (-2 / 128), rel=1e-6)
