"""Adapters beside their models, against what PEFT computed in float32 (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.numpy import NumPyBackend
from cuplama.conversion.merge import merge
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.new_adapter import adapter_files
from cuplama.models.peft import load_adapter
from cuplama.models.rounding import round_weights
from tests.adapters import LORA
from tests.paths import GOLDEN
from tools.runs import stepwise

FOLDERS = sorted(LORA.iterdir())
TOLERANCE = 2e-4
Prompts = list[tuple[list[int], np.ndarray[Any, Any]]]


def golden(folder: Path) -> Prompts:
    with np.load(folder / "golden.npz") as data:
        return [(data[f"prompt_{j}"].tolist(), data[f"logits_{j}"]) for j in range(3)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_logits(folder: Path) -> None:
    with cuplama.load(GOLDEN / folder.name, device="numpy", adapter=folder) as model:
        for prompt, wanted in golden(folder):
            assert np.abs(model.logits(prompt) - wanted).max() <= TOLERANCE
        prompt, wanted = golden(folder)[1]
        assert np.abs(stepwise(model, prompt) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_merged_model_is_the_adapted_one(folder: Path, tmp_path: Path) -> None:
    assert merge(GOLDEN / folder.name, folder, tmp_path / "out")
    with cuplama.load(tmp_path / "out", device="numpy") as model:
        for prompt, wanted in golden(folder):
            assert np.abs(model.logits(prompt) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_what_is_written_is_what_was_read(folder: Path) -> None:
    """The tensors, and of the settings those that say how they are used: PEFT reads our folders as its own."""
    config, weights = load_adapter(folder, load_config(GOLDEN / folder.name))
    settings, tensors = adapter_files(config, {n: w.array() for n, w in weights.items()}, "org/name")
    files = {source: w.parts[i] for w in weights.values() for i, source in enumerate(w.source)}
    assert tensors.keys() <= files.keys()
    assert all(np.array_equal(array, np.asarray(files[name])) for name, array in tensors.items())
    given = json.loads((folder / "adapter_config.json").read_text())
    assert len(tensors) == 2 * len(config.adapter.modules if config.adapter else ())
    for name in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias"):
        assert settings[name] == given[name]
    assert settings["base_model_name_or_path"] == "org/name"


def engine_of(folder: Path, convert: bool, quantize: str = "", decoded: bool = False) -> Model:
    """decoded: the numbers of quantised weights take their place."""
    case = GOLDEN / folder.name
    config, backend = load_config(case), NumPyBackend("f32", convert)
    weights = load_weights(case, config)
    if quantize:
        weights = round_weights(weights, config, quantize)
    if decoded:
        f32 = np.dtype(np.float32)
        weights = {n: replace(w, parts=(w.stored(f32).numbers(),)) if w.packed else w for n, w in weights.items()}
    adapted, more = load_adapter(folder, config)
    loaded = {name: backend.load_weight(w) for name, w in (weights | more).items()}
    return Model(case, adapted, None, Engine(backend, adapted, loaded, 64, 64), Settings())


def test_weights_that_stay_in_their_files() -> None:
    (prompt, wanted) = golden(LORA / "phi3")[1]
    with engine_of(LORA / "phi3", convert=False) as model:
        assert np.abs(model.logits(prompt) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("convert", [True, False])
def test_an_adapter_of_a_quantised_model(convert: bool) -> None:
    """The model's matrices are rounded, those of the adapter are not."""
    folder = LORA / "llama3-gqa"
    prompt, plain = golden(folder)[2]
    with engine_of(folder, convert, "int8") as found, engine_of(folder, True, "int8", decoded=True) as wanted:
        logits = wanted.logits(prompt)
        assert np.abs(found.logits(prompt) - logits).max() <= TOLERANCE
        assert np.abs(logits - plain).max() > 10 * TOLERANCE


def test_load_quantises_the_model_alone() -> None:
    folder = LORA / "llama3-gqa"
    prompt, _ = golden(folder)[1]
    with cuplama.load(GOLDEN / folder.name, device="numpy", quantize="int8", adapter=folder) as found:
        with engine_of(folder, True, "int8") as wanted:
            assert np.array_equal(found.logits(prompt), wanted.logits(prompt))
        done = found.generate(prompt, max_tokens=3, temperature=0)
        assert (done.adapter, found.adapter) == (str(folder), str(folder))
        assert found.num_parameters == wanted.num_parameters
