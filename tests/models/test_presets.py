"""The shapes that are known by name: that they are what was published."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cuplama.errors import ConfigError
from cuplama.files import read_json
from cuplama.models.config import load_config, parse_config
from cuplama.models.presets import SHAPES, find_shape, is_shape
from tests.paths import DATA, GOLDEN

# Parameters as the model cards count them, and (context, theta, window, eps) of config.json.
PUBLISHED = {
    "gemma-3-4b": (3_880_263_168, 131072, 1e4, 1024, 1e-6),
    "gemma-4-e4b": (7_463_013_418, 131072, 1e4, 512, 1e-6),
    "gpt2": (124_439_808, 1024, None, 0, 1e-5),
    "gpt-oss-20b": (20_914_757_184, 131072, 1.5e5, 128, 1e-5),
    "llama-2-7b": (6_738_415_616, 4096, 1e4, 0, 1e-5),
    "llama-3.1-8b": (8_030_261_248, 131072, 5e5, 0, 1e-5),
    "llama-3.2-1b": (1_235_814_400, 131072, 5e5, 0, 1e-5),
    "mistral-7b-v0.1": (7_241_732_096, 32768, 1e4, 4096, 1e-5),
    "mixtral-8x7b": (46_702_792_704, 32768, 1e6, 0, 1e-5),
    "phi-3-mini-4k": (3_821_079_552, 4096, 1e4, 2047, 1e-5),
    "qwen2.5-0.5b": (494_032_768, 32768, 1e6, 0, 1e-6),
    "qwen3.6-27b": (26_895_998_464, 262144, None, 0, 1e-6),
    "qwen3.6-35b-a3b": (34_660_610_688, 262144, None, 0, 1e-6),
    "qwen3-30b-a3b": (30_532_122_624, 40960, 1e6, 0, 1e-6),
    "qwen3-8b": (8_190_735_360, 40960, 1e6, 0, 1e-6),
}

WRAPPED = ("gemma-3-4b", "gemma-4-e4b", "qwen3.6-27b", "qwen3.6-35b-a3b")  # models of text and more
EXPERTS = ("mixtral-8x7b", "qwen3-30b-a3b")


def test_every_shape_is_checked_here() -> None:
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    known, config = find_shape(name)
    theta = config.layers[0].rope.theta if config.layers[0].rope else None
    elements = config.parameters(config.head_is_tied)
    assert (known, elements, config.context, theta, max(config.windows), config.eps) == (name, *PUBLISHED[name])


@pytest.mark.parametrize("name", EXPERTS)
def test_models_with_experts_are_those_of_the_published_config(name: str) -> None:
    published = parse_config(read_json(DATA / "configs" / f"{name}.json"))
    assert find_shape(name)[1] == replace(published, bos=None, eos=())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in (*WRAPPED, *EXPERTS, "gpt-oss-20b")])
def test_shapes_are_those_of_the_published_config(shared: Path, name: str) -> None:
    """All that a run depends on; the tokens that begin and end a text are not part of a shape."""
    published = load_config(shared / "configs" / name)
    assert find_shape(name)[1] == replace(published, bos=None, eos=())


@pytest.mark.parametrize("name", WRAPPED)
def test_some_are_the_text_part_of_the_published_config(name: str) -> None:
    published, found = parse_config(read_json(DATA / "configs" / f"{name}.json")), find_shape(name)[1]
    assert found == replace(published, bos=None, eos=(), tied=name.startswith("gemma"), wrapper=None)


def test_gpt_oss_is_the_published_config() -> None:
    published = parse_config(read_json(DATA / "configs" / "gpt-oss-20b.json"))
    assert find_shape("gpt-oss-20b")[1] == replace(published, dtype="bfloat16", bos=None, eos=())


def test_llama_3_scales_its_rotation() -> None:
    for name, factor in (("llama-3.1-8b", 8.0), ("llama-3.2-1b", 32.0)):
        (rope,) = find_shape(name)[1].ropes.values()
        assert (rope.type, rope.original, rope.context) == ("llama3", 8192, 131072)
        assert rope.settings == {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("name", "dims"), [("qwen3-8b", (32, 8, 128)), ("qwen2.5-0.5b", (14, 2, 64)),
                                            ("llama-3.2-1b", (32, 8, 64)), ("phi-3-mini-4k", (32, 32, 96)),
                                            ("gpt2", (12, 12, 64))])  # fmt: skip
def test_heads(name: str, dims: tuple[int, ...]) -> None:
    config = find_shape(name)[1]
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == dims


def test_dtypes_and_activations() -> None:
    configs = {name: find_shape(name)[1] for name in SHAPES}
    assert {n: c.stored for n, c in configs.items() if c.stored != "bf16"} == {"gpt2": "f32", "llama-2-7b": "f16"}
    assert {n for n, c in configs.items() if c.tied} == {
        "gemma-3-4b", "gemma-4-e4b", "gpt2", "llama-3.2-1b", "qwen2.5-0.5b",
    }  # fmt: skip
    activations = {n: c.activation for n, c in configs.items() if c.activation != "silu_mul"}
    assert activations == {
        "gemma-3-4b": "gelu_tanh_mul", "gemma-4-e4b": "gelu_tanh_mul", "gpt2": "gelu_tanh",
        "gpt-oss-20b": "clamped_swiglu",
    }  # fmt: skip


def test_a_folder_is_its_own_shape_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, config = find_shape(str(GOLDEN / "llama3-gqa"))
    assert (name, config) == ("llama3-gqa", load_config(GOLDEN / "llama3-gqa"))
    assert (is_shape("gpt2"), is_shape("gpt3"), is_shape(None)) == (True, False, False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    shutil.copy(GOLDEN / "llama3-gqa" / "config.json", tmp_path / "gpt2")
    assert not is_shape("gpt2")
    assert find_shape("gpt2") == ("gpt2", config)


def test_other_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'gpt3' is neither a folder .* known shapes: gemma-3-4b, gemma-4-e4b, gpt-oss-20b, gpt2, .*qwen3-8b$",
    ):
        find_shape("gpt3")
