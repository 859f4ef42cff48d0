"""Training of adapters: their gradients against torch's in float64, and a frozen model that may be quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
from cuplama.backends import Backend
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.numpy import NumPyBackend
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import ModelConfig, load_config
from cuplama.models.new_adapter import adapter_files, initial_weights, new_adapter
from cuplama.models.rounding import round_weights
from cuplama.train import Batch, Trainer, TrainingSettings, gradients
from tests.fakes import FakeGpu
from tests.train.goldens import TRAINING, golden, relative_error

FOLDERS = sorted((TRAINING.parent / "lora_training").iterdir())
BASE = TRAINING / "llama-3-kv-heads"
IDS = np.array(json.loads((BASE / "meta.json").read_text())["token_ids"])
CONTEXT = IDS.shape[1] - 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_gradients(folder: Path) -> None:
    case, wanted = golden(folder.name), load_file(folder / "gradients.safetensors")
    with cuplama.load(case.folder, device="numpy", adapter=folder) as model:
        loss, found = gradients(model, case.ids)
    assert abs(loss - json.loads((folder / "meta.json").read_text())["loss"]) <= 1e-6
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], g) for name, g in wanted.items()}
    assert not {name: error for name, error in errors.items() if error > 1e-5}


def test_gradients_of_an_adapter_of_a_quantised_model() -> None:
    """They are near those of the model as it was, whose own weights have no gradients."""
    folder = next(f for f in FOLDERS if f.name == BASE.name)
    with cuplama.load(BASE, device="numpy", adapter=folder, quantize="int8") as model:
        loss, found = gradients(model, IDS)
    assert loss == pytest.approx(json.loads((folder / "meta.json").read_text())["loss"], abs=0.01)
    wanted = load_file(folder / "gradients.safetensors")
    errors = {name: relative_error(found[name], g) for name, g in wanted.items()}
    assert max(errors.values()) < 0.1


def _trainer(backend: Backend, quantize: str | None, steps: int) -> tuple[Trainer, ModelConfig]:
    config = load_config(BASE)
    weights: dict[str, Any] = load_weights(BASE, config)
    if quantize is not None:
        weights = round_weights(weights, config, quantize)
    config = new_adapter(config, 3, targets=["q_proj", "v_proj", "down_proj"])
    settings = TrainingSettings(steps, lr=0.02, schedule="constant", lora=3)
    return Trainer(config, weights | initial_weights(config, 7), settings, backend, CONTEXT), config


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_trained_adapter_is_loaded_as_it_was(quantize: str | None, tmp_path: Path) -> None:
    trainer, config = _trainer(NumPyBackend(), quantize, 4)
    batch = Batch.of_rows(IDS)
    losses = [trainer.step([batch], 0.02).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01
    final, arrays = trainer.evaluate([batch]), trainer.weights()
    assert arrays.keys() == {n for n in config.weight_shapes() if ".lora_" in n}
    rank, (rows, _) = 3, arrays["0.qkv_proj.lora_b"].shape
    keys = config.lora_parts()["0.qkv_proj.lora_part"] == 1
    assert 0 < keys.sum() < rows
    assert not arrays["0.qkv_proj.lora_b"][keys].any()  # k is not adapted, and stays so
    assert not arrays["0.qkv_proj.lora_a"][rank : 2 * rank].any()
    assert arrays["0.qkv_proj.lora_b"][~keys].all()
    settings, tensors = adapter_files(config, arrays, "base")
    assert {n: a.tolist() for n, a in trainer.export()} == {n: a.tolist() for n, a in tensors.items()}
    trainer.close()
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with cuplama.load(BASE, device="numpy", adapter=tmp_path, quantize=quantize) as model:
        logits = np.stack([model.logits(row[:-1].tolist()) for row in IDS]).astype(np.float64)
    p = logits - logits.max(-1, keepdims=True)
    p -= np.log(np.exp(p).sum(-1, keepdims=True))
    loss = -np.take_along_axis(p, IDS[:, 1:, None], -1).mean()
    assert loss == pytest.approx(final, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_steps_on_the_emulator(quantize: str | None) -> None:
    """The kernels give the steps of the references."""
    batch = Batch.of_rows(IDS)
    found = []
    for backend in (NumPyBackend(), CudaBackend("f32", gpu=FakeGpu(emulate=True))):
        trainer, _ = _trainer(backend, quantize, 3)
        found.append([trainer.step([batch], 0.02).wait() for _ in range(3)])
        trainer.close()
    np.testing.assert_allclose(found[1], found[0], rtol=2e-4)
