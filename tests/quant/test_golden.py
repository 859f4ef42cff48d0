"""Quantised checkpoints of every layout against what transformers computes with the same numbers in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
from cuplama.config import load_config
from cuplama.errors import CheckpointError, ConfigError
from cuplama.models.checkpoint import folder_tensors, load_weights
from cuplama.quant.readers import READERS
from tests.paths import GOLDEN
from tools.divergence import alike, compared, divergence, rows_of
from tools.golden_figures import allowed
from tools.runs import in_one_piece

FOLDERS = sorted((GOLDEN.parent / "quantised").iterdir())
TOLERANCE = 2e-3  # of logits whose deviation is about 3; quantising changed them by 0.3 to 8


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_logits(folder: Path) -> None:
    """And experts, of models that have some."""
    with np.load(folder / "golden.npz") as golden:
        prompts, rows = rows_of(golden)
    assert list(map(len, prompts)) == [1, 9, 29]
    with cuplama.load(folder, device="numpy", dtype="float32") as model:
        assert rows[0].experts.shape[0] == (model.config.num_layers if model.config.experts else 0)
        for prompt, wanted in zip(prompts, rows, strict=True):
            found = in_one_piece(model, prompt)
            assert np.abs(found.logits - wanted.logits).max() <= TOLERANCE
            assert alike(wanted, found) == len(prompt)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_bfloat16_stays_as_close_to_float32_as_transformers(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "golden.npz") as golden:
        prompts, rows = rows_of(golden)
    with cuplama.load(folder, device="numpy", dtype="bfloat16") as model:
        found = [divergence(wanted, in_one_piece(model, p)) for p, wanted in zip(prompts, rows, strict=True)]
    counts, known = compared(meta, "bfloat16", prompts), meta["kl"]["bfloat16"]
    of_both = np.concatenate([part[:n] for part, n in zip(found, counts, strict=True)])
    assert 0 < of_both.mean() <= allowed(len(of_both) / sum(map(len, prompts))) * known
    assert known < 2e-3  # a near tie that is not left out makes 20 times that


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_matrices_stay_as_they_are_stored(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    weights = load_weights(folder, load_config(folder))
    plain = {p.name for p in folder_tensors(folder, load_config(folder)).values() if isinstance(p.data, np.ndarray)}
    packed = {source for w in weights.values() if w.packed for source in w.source}
    assert len(packed - plain) == meta["matrices"]


def test_every_reader_has_a_golden_model() -> None:
    methods = {load_config(folder).raw["quantization_config"]["quant_method"] for folder in FOLDERS}
    assert {READERS[method] for method in methods} == set(READERS.values())


def test_biases_of_zeros_that_no_layer_has(tmp_path: Path) -> None:
    """As AutoGPTQ writes them for every layer. Others are not ignored."""
    folder = GOLDEN.parent / "quantised" / "gptq"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name, tensors = "model.layers.0.mlp.down_proj.bias", load_file(folder / "model.safetensors")
    assert name not in tensors
    bias = np.zeros(tensors["model.norm.weight"].shape, np.float16)
    save_file({**tensors, name: bias}, tmp_path / "model.safetensors")
    wanted, found = (load_weights(f, load_config(f)).keys() for f in (folder, tmp_path))
    assert wanted == found
    bias[3] = 1
    save_file({**tensors, name: bias}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} \[\d+\] has no place in LlamaForCausalLM"):
        load_weights(tmp_path, load_config(tmp_path))
    plain = "model.norm.bias"
    save_file({**tensors, plain: np.zeros_like(bias)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {plain} \[\d+\] has no place"):
        load_weights(tmp_path, load_config(tmp_path))


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """AutoGPTQ's first checkpoints have no quantization_config in config.json."""
    folder = GOLDEN.parent / "quantised" / "gptq"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    settings = raw.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    beside = {"bits": 4, "group_size": 128, "desc_act": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
    assert load_config(tmp_path).raw["quantization_config"] == {"quant_method": "gptq", **beside}
    assert settings["quant_method"] == "gptq"
    wanted, found = (load_weights(f, load_config(f))["0.qkv_proj"].parts[0] for f in (folder, tmp_path))
    assert np.array_equal(wanted.numbers(), found.numbers())  # type: ignore[union-attr]


def changed(name: str, tmp_path: Path, change: Any = None, **settings: Any) -> Path:
    """A copy of a golden model with other settings, and with tensors that ``change`` changes."""
    folder = GOLDEN.parent / "quantised" / name
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= settings
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_an_unknown_method_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        load_config(changed("gptq", tmp_path, quant_method="hqq"))
    assert str(e.value) == (
        f'{tmp_path}/config.json: quantization_config.quant_method is "hqq"; supported: {", ".join(READERS)}'
    )


def test_settings_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(changed("gptq", tmp_path, frobnicate=1))
    assert "fields that nothing reads are left out: quantization_config.frobnicate" in caplog.text


def test_a_quantised_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    def shorter(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.up_proj."
        for end in ("qweight", "qzeros", "scales"):
            tensors[name + end] = np.ascontiguousarray(tensors[name + end][:, : tensors[name + end].shape[1] // 2])

    folder = changed("gptq", tmp_path, shorter)
    with pytest.raises(cuplama.CuplamaError) as e:
        load_weights(folder, load_config(folder))
    assert str(e.value) == (
        f"{tmp_path}/model.safetensors: tensor model.layers.0.mlp.up_proj.qweight has shape [128, 128];"
        " config.json asks for [256, 128]"
    )


def test_experts_that_are_not_all_quantised_alike_are_refused(tmp_path: Path) -> None:
    """Or whose columns have an order of their own: one launch computes all experts of a layer."""
    module = "model.layers.0.mlp.experts.3.up_proj"

    def plain(tensors: dict[str, Any]) -> None:
        for end in (".qweight", ".qzeros", ".scales", ".g_idx"):
            tensors.pop(module + end, None)
        tensors[f"{module}.weight"] = np.zeros((32, 64), np.float16)

    def ordered(tensors: dict[str, Any]) -> None:
        tensors[f"{module}.g_idx"] = np.ascontiguousarray(tensors[f"{module}.g_idx"][::-1])

    folder = changed("gptq-experts", tmp_path / "plain", plain)
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.gate_proj\S* is int4 .*3\.up_proj.weight is plain; the experts"
    ):
        load_weights(folder, load_config(folder))
    folder = changed("gptq-experts", tmp_path / "ordered", ordered, desc_act=True)
    with pytest.raises(
        CheckpointError, match=rf"tensor {module}\S* has an order of columns \(desc_act\); experts cannot"
    ):
        load_weights(folder, load_config(folder))
