"""GGUF files as models: config and tensor names by architecture, and logits against both kinds of golden."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.errors import CheckpointError, ConfigError
from cuplama.gguf import open_gguf
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import ModelConfig, load_config
from cuplama.models.gguf import ARCHITECTURES, gguf_config, gguf_generation
from tests.gguf_files import write_gguf
from tests.gguf_models import convert, write_converted
from tests.paths import DATA, GOLDEN

Array = np.ndarray[Any, Any]
# What a GGUF file cannot say, or says otherwise: windows of Mistral and Qwen, the exact GELU, dynamic scaling, ...
UNSAID = {"mistral-window", "qwen2-window", "gpt2-exact-gelu", "llama-rope-dynamic", "llama-yarn-options"}
_READ = {row.name for row in ARCHITECTURES.values()}
CASES = sorted(
    p.name
    for p in GOLDEN.iterdir()
    if p.name not in UNSAID and p.name != "gpt2-char" and load_config(p).architecture in _READ
)
QUANTISED = sorted(p.stem for p in (DATA / "gguf").glob("*.gguf"))


def difference(a: Array, b: Array) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_of_plain_files_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The golden weights are exact in both 16-bit types."""
    case = GOLDEN / name
    context = json.loads((case / "meta.json").read_text())["context"]
    path = write_converted(case, tmp_path / "m.gguf", "BF16" if "llama" in name else "F16")
    with cuplama.load(path, device="numpy", context=context) as model, np.load(case / "golden.npz") as golden:
        for j in range(4):
            found = model.logits(golden[f"prompt_{j}"].tolist())
            assert difference(found, golden[f"logits_{j}"]) <= 2e-4


def test_there_is_a_case_for_every_architecture() -> None:
    for names, folder in ((CASES, None), (QUANTISED, DATA / "gguf")):
        found = {
            convert(GOLDEN / n)[0]["general.architecture"]
            if folder is None
            else open_gguf(folder / f"{n}.gguf").get("general.architecture", str)
            for n in names
        }
        assert found == set(ARCHITECTURES)


@pytest.mark.parametrize("name", QUANTISED)
def test_logits_of_quantised_files(name: str) -> None:
    """Against float32 models of the numbers that the `gguf` package dequantises (tools/make_gguf_goldens.py)."""
    path = DATA / "gguf" / f"{name}.gguf"
    assert path.stat().st_size < 200_000
    with cuplama.load(path, device="numpy") as model, np.load(path.with_suffix(".npz")) as golden:
        assert model.config.dtype == "bfloat16"
        for j in range(3):
            found = model.logits(golden[f"prompt_{j}"].tolist())
            assert difference(found, golden[f"logits_{j}"]) <= 2e-3


@pytest.mark.parametrize("name", CASES)
def test_the_config_is_that_of_the_folder(name: str, tmp_path: Path) -> None:
    """All that is computed with; eps, theta and factors are the decimals of config.json again."""
    wanted = load_config(GOLDEN / name)
    found = load_config(write_converted(GOLDEN / name, tmp_path / "m.gguf"))
    for field in ("family", "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        assert getattr(found, field) == getattr(wanted, field)
    assert (found.eps, found.context, found.activation, found.windows) == (
        wanted.eps, wanted.context, wanted.activation, wanted.windows,
    )  # fmt: skip
    assert found.flags == wanted.flags
    assert found.num_layers == wanted.num_layers
    for mine, theirs in zip(found.layers, wanted.layers, strict=True):
        if mine.rope is None or theirs.rope is None:
            assert mine.rope is theirs.rope
            continue
        assert (mine.rope.type, mine.rope.theta, mine.rope.dim) == (
            theirs.rope.type,
            theirs.rope.theta,
            theirs.rope.dim,
        )
        for length in (1, 100):
            (a, a_factor), (b, b_factor) = mine.rope.frequencies(length), theirs.rope.frequencies(length)
            assert np.array_equal(a, b)
            assert np.float32(a_factor) == np.float32(b_factor)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_dtype(kind: str, dtype: str, tmp_path: Path) -> None:
    """Norms are F32 in every file, and say nothing."""
    assert load_config(write_converted(GOLDEN / "qwen2", tmp_path / "m.gguf", kind)).dtype == dtype


# ---- rotations -------------------------------------------------------------------------------------------------------
Changed = Callable[..., ModelConfig]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """The config of a golden case with other keys; "." is written "__", None removes a key."""

    def config(case: str = "llama3-gqa", divisors: Array | None = None, **changes: Any) -> ModelConfig:
        metadata, pieces = convert(GOLDEN / case)
        metadata |= {key.replace("__", "."): value for key, value in changes.items()}
        tensors: dict[str, Any] = {n: ("F32", p.array.shape, p.array) for n, p in pieces.items()}
        if divisors is not None:
            tensors["rope_freqs.weight"] = ("F32", divisors.shape, divisors.astype(np.float32))
        kept = {key: value for key, value in metadata.items() if value is not None}
        return load_config(write_gguf(tmp_path / "m.gguf", kept, tensors))

    return config


def test_divisors_that_no_llama_has(changed: Changed) -> None:
    divisors = np.array([1.0, 3.0, 2.0, 7.5])
    (layer, *_) = changed(divisors=divisors).layers
    plain = changed().layers[0].rope
    assert layer.rope is not None
    assert plain is not None
    for length in (1, 1000):
        found, factor = layer.rope.frequencies(length)
        assert np.array_equal(found, plain.frequencies(1)[0] / divisors.astype(np.float32))
        assert factor == 1
    assert layer.rope.regime(10**6) == 0


def test_scalings(changed: Changed) -> None:
    def rope(**changes: Any) -> tuple[str, Any]:
        found = changed(**{f"llama__rope__{key}": value for key, value in changes.items()}).layers[0].rope
        assert found is not None
        return found.type, dict(found.settings)

    assert rope() == ("default", {})
    assert rope(scaling__type="none") == ("default", {})
    assert rope(scaling__type="linear", scaling__factor=2.5) == ("linear", {"factor": 2.5})
    assert rope(scale_linear=4.0) == ("linear", {"factor": 4.0})
    assert rope(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=32) == (
        "yarn", {"factor": 4.0},
    )  # fmt: skip
    kind, settings = rope(
        scaling__type="yarn", scaling__factor=4.0, scaling__attn_factor=0.5, scaling__yarn_beta_fast=16.0
    )
    assert kind == "yarn"
    assert settings["beta_fast"] == 16
    assert settings["attention_factor"] == pytest.approx(0.5 * (0.1 * np.log(4) + 1))


def test_no_freq_base_is_ten_thousand(changed: Changed) -> None:
    rope = changed(llama__rope__freq_base=None).layers[0].rope
    assert rope is not None
    assert rope.theta == 10000


WRONG = [
    ({"general__architecture": None}, "general.architecture is missing"),
    ({"general__architecture": "mamba"}, "general.architecture is 'mamba'; supported: llama, qwen2, qwen3, phi3, gpt2"),
    ({"general__architecture": 3}, "general.architecture is a whole number; it must be text"),
    ({"llama__block_count": None}, "llama.block_count is missing"),
    ({"llama__block_count": "2"}, "llama.block_count is text; it must be a whole number or an array of numbers"),
    ({"llama__attention__head_count": 0}, "num_attention_heads = 0 is not a positive whole number"),
    ({"llama__attention__head_count_kv": np.array([2, 1], np.int32)}, "head_count_kv differs from layer to layer"),
    (
        {"llama__block_count": np.array([np.nan, np.nan])},
        "llama.block_count is an array of floats; it must be one of wh",
    ),
    ({"llama__block_count": np.array([2.0, 2.0])}, "llama.block_count is an array of floats; it must be one of whole"),
    ({"llama__attention__value_length": 12}, "llama.attention.value_length is 12; supported: 8, as of keys"),
    ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps = NaN is not supported"),
    ({"llama__expert_count": 8}, "num_local_experts = 8 is not supported"),
    ({"llama__logit_scale": 2.0}, "logit_scale = 2.0 is not supported"),
    ({"llama__rope__dimension_count": 9}, "llama.rope.dimension_count is 9; supported: 1 to head_dim = 8"),
    ({"llama__rope__dimension_count": 4}, "partial_rotary_factor = 0.5 is not supported"),
    (
        {"llama__rope__scaling__type": "ntk"},
        "llama.rope.scaling.type is 'ntk'; supported: none, linear, yarn, longrope",
    ),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[words for _, words in WRONG])
def test_metadata_that_is_not_supported(changes: dict[str, Any], words: str, changed: Changed) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        changed(**changes)
    assert words in str(caught.value)
    assert "m.gguf: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_value_for_each_layer(changed: Changed) -> None:
    assert changed(llama__attention__head_count_kv=np.array([2, 2], np.int32)).num_kv_heads == 2


def test_keys_that_nothing_reads_are_named(changed: Changed, caplog: pytest.LogCaptureFixture) -> None:
    changed()
    assert caplog.messages == []
    changed(llama__new_trick=1, tokenizer__other=2, llama__rope__scaling__finetuned=True)
    (message,) = caplog.messages
    assert message.endswith("m.gguf: fields that nothing reads are left out: llama.new_trick")


def test_divisors_that_do_not_fit(changed: Changed) -> None:
    words = r"rope_freqs.weight has type F32 and shape \[3\]; it must be F32 and \[4\]"
    with pytest.raises(CheckpointError, match=words):
        changed(divisors=np.ones(3))
    for odd in ({"llama__rope__dimension_count": 7}, {"llama__rope__freq_base": -1.0}):
        with pytest.raises(ConfigError, match="is not supported"):
            changed(divisors=np.ones(3 if "llama__rope__dimension_count" in odd else 4), **odd)
    with pytest.raises(ConfigError, match=r"scaling\.type is 'linear', beside a tensor rope_freqs\.weight"):
        changed(divisors=np.ones(4), llama__rope__scaling__type="linear")


# ---- tensors ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def failure(tmp_path: Path) -> Callable[..., str]:
    """What loading the weights of a golden case says where some tensors are others; None removes one."""

    def found(case: str = "llama3-gqa", **changes: Any) -> str:
        metadata, pieces = convert(GOLDEN / case)
        tensors: dict[str, Any] = {n: ("F32", p.array.shape, p.array) for n, p in pieces.items()}
        tensors |= {name.replace("__", "."): value for name, value in changes.items()}
        path = write_gguf(tmp_path / "m.gguf", metadata, {n: t for n, t in tensors.items() if t is not None})
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load_weights(path, load_config(path))
        return str(caught.value).replace(str(path), "m.gguf")

    return found


def plain(*shape: int) -> Any:
    return "F32", shape, np.zeros(shape, np.float32)


def test_tensors_that_do_not_fit(failure: Callable[..., str]) -> None:
    assert failure(blk__1__ffn_up__weight=None) == "m.gguf: tensor blk.1.ffn_up.weight is missing"
    assert failure(token_embd__weight=None) == "m.gguf: tensor token_embd.weight is missing"
    assert failure("gpt2", blk__0__attn_qkv__bias=None) == "m.gguf: tensor blk.0.attn_qkv.bias is missing"
    assert failure(blk__0__attn_q__weight=plain(31, 32)).startswith(
        "m.gguf: tensor blk.0.attn_q.weight has shape [31, 32]; its metadata asks for [32, 32]"
    )
    assert "tensor blk.0.extra.weight [2] has no place in LlamaForCausalLM as its metadata describes it" in failure(
        blk__0__extra__weight=plain(2)
    )
    assert "tensors blk.0.ffn_up.weight and blk.00.ffn_up.weight are the same weight" in failure(
        blk__00__ffn_up__weight=plain(40, 32)
    )
    iq2 = ("IQ2_XS", (32, 256), np.zeros(32 * 74, np.uint8))
    assert "tensor blk.0.attn_v.weight has type IQ2_XS; supported: matrices of F32" in failure(
        blk__0__attn_v__weight=iq2
    )


def test_mapped_and_not_copied(tmp_path: Path) -> None:
    """Rows of q and k in another order are read when they are asked for; the rest is views."""
    path = write_converted(GOLDEN / "llama3-gqa", tmp_path / "m.gguf")
    weights = load_weights(path, load_config(path))
    for base in (weights["0.gate_up_proj"].parts[0], weights["embed_tokens"].parts[0]):
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base  # type: ignore[assignment]
        assert isinstance(base, mmap.mmap | np.memmap)
    golden = load_weights(GOLDEN / "llama3-gqa", load_config(GOLDEN / "llama3-gqa"))
    for name, weight in golden.items():
        assert np.array_equal(weights[name].array(), weight.array()), name


def test_sampling_settings(tmp_path: Path) -> None:
    def settings(**keys: Any) -> dict[str, Any]:
        metadata = {f"general.sampling.{key}": value for key, value in keys.items()}
        return gguf_generation(open_gguf(write_gguf(tmp_path / "m.gguf", metadata)))

    assert settings() == {}
    assert settings(temp=0.7, top_k=20, top_p=0.8, penalty_repeat=1.05) == {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
    }  # fmt: skip
    assert settings(temp=0.0) == {"do_sample": False, "temperature": None}
    assert settings(mirostat=2)["general.sampling.mirostat"] == 2


def test_settings_of_a_loaded_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_converted(
        GOLDEN / "llama3-gqa", tmp_path / "m.gguf", general__sampling__temp=0.5, general__sampling__mirostat=2
    )
    with cuplama.load(path, device="numpy") as model:
        assert dict(model.defaults) == {"temperature": 0.5, "top_k": 50}
        assert model.folder == path
    assert any("m.gguf: general.sampling.mirostat = 2 is not supported" in m for m in caplog.messages)


def test_the_config_has_the_metadata_beside_it(tmp_path: Path) -> None:
    raw = gguf_config(open_gguf(write_converted(GOLDEN / "llama32-tied", tmp_path / "m.gguf")))
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["tie_word_embeddings"] is True
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    assert raw["original_max_position_embeddings"] == 32
