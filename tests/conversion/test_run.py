"""Quantising a folder: what is written, that it can be stopped at any place, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import cuplama
from cuplama.conversion.folder import RECORD, OutputFolder
from cuplama.conversion.run import Options, quantise
from cuplama.conversion.shards import make_shards
from cuplama.errors import CheckpointError, ConfigError, CuplamaError, ParameterError
from cuplama.models.checkpoint import load_weights, open_tensors
from cuplama.models.config import load_config
from cuplama.quant.compressed import TensorSpec
from cuplama.quant.grid import GRIDS
from cuplama.quant.rtn import Rounded
from tests.conversion.made import TEXT, stopped_at, write_model
from tests.paths import GOLDEN
from tests.tiny import CHARS

INT4 = Options("int4", 32)
GPTQ = Options("int4", 32, "gptq", TEXT, samples=6, length=50, device="numpy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain"))


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("options", [INT4, Options("int4", 0), Options("int8"), Options("int8", 32), Options("fp8")])
def test_the_folder_holds_the_weights_rounded_to_the_nearest(model: Path, tmp_path: Path, options: Options) -> None:
    assert quantise(model, tmp_path / "out", options)
    assert sorted(_files(tmp_path / "out")) == ["config.json", "model.safetensors", RECORD, "tokenizer.json"]
    plain = load_weights(model, load_config(model))
    found = load_weights(tmp_path / "out", load_config(tmp_path / "out"))
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        if "." in name and len(weight.shape) == 2:
            for part, q in zip(weight.parts, found[name].parts, strict=True):
                rounded = Rounded(part, GRIDS[options.format], options.group_size or 0)
                assert np.array_equal(q.numbers(), rounded.numbers())  # type: ignore[union-attr]
        else:
            assert np.array_equal(found[name].array(), weight.array())
    with cuplama.load(tmp_path / "out", device="numpy") as made:
        assert len(made.generate("To be", max_tokens=4, temperature=0).tokens) == 4


@pytest.mark.parametrize("options", [INT4, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("stop", [0, 1, 2, 4])
def test_a_run_that_was_stopped_goes_on_to_the_same_folder(
    model: Path, tmp_path: Path, options: Options, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a part, or at the end; nothing looks complete until then."""
    options = replace(options, shard_bytes=40_000)
    assert quantise(model, tmp_path / "whole", options)
    stopped, out = stopped_at(stop, part=0.5), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "write", stopped)
        if stop == 4:
            patch.setattr(OutputFolder, "finish", stopped)
        with pytest.raises((KeyboardInterrupt, TypeError)):
            quantise(model, out, options)
    assert not any(
        p.name == "config.json" or (p.suffix in (".safetensors", ".json") and p.name != RECORD) for p in out.iterdir()
    )
    with pytest.raises(CuplamaError):
        cuplama.load(out, device="numpy")
    steps: list[tuple[int, int]] = []
    assert quantise(model, out, options, lambda done, total: steps.append((done, total)))
    assert _files(out) == _files(tmp_path / "whole")
    assert len([name for name in _files(out) if name.endswith(".safetensors")]) > 1
    assert (steps[0], steps[-1]) == ((0, 3), (3, 3))
    assert not quantise(model, out, options)


def test_gptq_changes_the_logits_less_than_rounding(model: Path, tmp_path: Path) -> None:
    prompt = "whether 'tis nobler in the mind"
    with cuplama.load(model, device="numpy") as m:
        expected = m.logits(prompt)
    off = {}
    for method, options in (("rtn", INT4), ("gptq", GPTQ)):
        quantise(model, tmp_path / method, options)
        with cuplama.load(tmp_path / method, device="numpy") as m:
            off[method] = np.linalg.norm(m.logits(prompt) - expected)
    assert off["gptq"] < 0.7 * off["rtn"]


def test_a_tied_head_is_stored_once_and_a_bare_export_keeps_its_names(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", tie_word_embeddings=True)
    assert quantise(tied, tmp_path / "out", INT4)
    weights = load_weights(tmp_path / "out", load_config(tmp_path / "out"))
    assert weights["lm_head"].source == weights["embed_tokens"].source


def test_what_is_in_the_way_is_left_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"full is not empty"):
        quantise(model, full, INT4)
    with pytest.raises(CheckpointError, match=r"thesis.txt: Not a directory"):
        quantise(model, full / "thesis.txt", INT4)
    out = tmp_path / "out"
    quantise(model, out, INT4)
    with pytest.raises(CheckpointError, match=r'made with format = "int4", not "int8", group_size = 32, not 0'):
        quantise(model, out, Options("int8"))
    other = write_model(tmp_path / "other", rms_norm_eps=1e-6)
    with pytest.raises(CheckpointError, match=r"made with source = "):
        quantise(other, out, INT4)
    (out / RECORD).write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantize.json says neither a recipe nor what is done"):
        quantise(model, out, INT4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"the model takes 0.00 GB and 0.00 GB are free"):
        quantise(model, tmp_path / "no" / "room", INT4)
    assert not (tmp_path / "no").exists()


def test_what_holds_nothing_yet_is_begun_anew(model: Path, tmp_path: Path) -> None:
    """A run that failed before its first part, and another with other options."""
    out, other = tmp_path / "out", tmp_path / "other"
    OutputFolder(out, {"format": "int8"}, make_shards({"a": TensorSpec("F32", (2,))}, 10**6))
    assert {p.name for p in out.iterdir()} == {RECORD, "model.safetensors.unfinished"}
    quantise(model, out, INT4)
    quantise(model, other, INT4)
    assert _files(out) == _files(other)


def test_a_disk_that_is_full_is_named_and_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"

    def full(self: OutputFolder, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "_write", full)
        with pytest.raises(CheckpointError, match=r"out: No space left on device; the same command goes on"):
            quantise(model, out, INT4)
    assert json.loads((out / RECORD).read_text())["done"] == 0
    quantise(model, out, INT4)
    quantise(model, other, INT4)
    assert _files(out) == _files(other)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("options", [INT4, Options("int8"), Options("fp8"), GPTQ], ids=["int4", "int8", "fp8", "gptq"])
def test_weights_that_are_not_finite(model: Path, tmp_path: Path, options: Options, value: float) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = {n: np.array(t.data) for n, t in open_tensors(source).items()}
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"source: tensor {name} holds numbers that are not finite"):
        quantise(source, out, options)
    assert not (out / "config.json").exists()


def test_a_text_that_is_short(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantise(model, tmp_path / "out", replace(GPTQ, text="To be"))
    assert caplog.messages == [
        "the calibration text is short: it gives 5 tokens, where 6 samples of 50 tokens were asked for"
    ]
    caplog.clear()
    quantise(model, tmp_path / "long", GPTQ)
    assert caplog.messages == []


def test_a_model_without_a_tokenizer_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CuplamaError, match=r"tokenizer.json does not exist"):
        quantise(source, tmp_path / "out", GPTQ)
    assert not (tmp_path / "out").exists()


def test_parts_that_are_gone_are_noticed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantise(model, out, INT4)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"out/model.safetensors is missing or of another size"):
        quantise(model, out, INT4)
    (out / RECORD).write_text((out / RECORD).read_text().replace("true", "false"))
    with pytest.raises(CheckpointError, match=r"model.safetensors.unfinished is missing or of another size"):
        quantise(model, out, INT4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options("int3"), "format = 'int3' is not supported; supported: int4, int8, fp8"),
        (Options("int4", 100), "group_size = 100 is not supported; supported: 128, 64, 32, 0 for whole rows"),
        (Options("int4", 64), "group_size = 64 does not divide the rows of model.layers.0.mlp.down_proj.weight, which"
         " have 96 numbers; possible here: 32, 0 for whole rows"),
        (Options("int4", method="awq"), "method = 'awq' is not supported; supported: rtn, gptq"),
        (Options("int4", method="gptq"), "needs a text"),
        (Options("int4", text="To be"), "text is for method = gptq alone"),
        (replace(GPTQ, length=129), "length = 129 is out of range; it must be a number from 1 to 128, the model's"),
        (replace(GPTQ, samples=0), "samples = 0 is out of range"),
        (replace(GPTQ, device="tpu"), "device = 'tpu'"),
    ],
)  # fmt: skip
def test_options_that_are_refused(model: Path, tmp_path: Path, options: Options, words: str) -> None:
    with pytest.raises(ParameterError) as caught:
        quantise(model, tmp_path / "out", options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_that_are_refused(model: Path, tmp_path: Path) -> None:
    quantise(model, tmp_path / "out", INT4)
    with pytest.raises(ConfigError, match=r"out is quantised already"):
        quantise(tmp_path / "out", tmp_path / "again", INT4)
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel stores its matrices transposed"):
        quantise(CHARS, tmp_path / "again", INT4)
    with pytest.raises(ConfigError, match=r"config.json is a file; only folders"):
        quantise(model / "config.json", tmp_path / "again", INT4)


def test_the_config_is_that_of_the_model_with_a_description(model: Path, tmp_path: Path) -> None:
    quantise(model, tmp_path / "out", GPTQ)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    described = found.pop("quantization_config")
    assert found == json.loads((model / "config.json").read_text())
    assert described["config_groups"]["group_0"]["weights"]["actorder"] == "weight"


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    """As matrices like any other; routers stay, and compressed-tensors says so."""
    folder = GOLDEN / "qwen3-moe"
    quantise(folder, tmp_path / "out", Options("int8"))
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
    prompt = [5, 6, 7, 8]
    with (
        cuplama.load(tmp_path / "out", device="numpy") as model,
        cuplama.load(folder, device="numpy", quantize="int8") as wanted,
    ):
        np.testing.assert_allclose(model.logits(prompt), wanted.logits(prompt), atol=1e-5, rtol=0)


def test_what_is_not_written_of_experts(tmp_path: Path) -> None:
    with pytest.raises(
        ParameterError, match="method = gptq does not take the experts of Qwen3MoeForCausalLM; rtn does"
    ):
        quantise(GOLDEN / "qwen3-moe", tmp_path / "out", Options("int8", method="gptq", text=TEXT))
    with pytest.raises(
        ConfigError, match="GptOssForCausalLM stores its matrices transposed, head by head, or those of"
    ):
        quantise(GOLDEN / "gpt-oss", tmp_path / "out", Options("int8"))
