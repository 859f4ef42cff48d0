"""Models with quantised experts as the GPU runs them, on the emulator: packed from the bytes of the file, prompts on
unpacked numbers and steps on blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.ops import experts_packed
from cuplama.ops.experts_packed import Ways
from cuplama.quant.packed import Packed, packed
from tests.fakes import FakeGpu
from tests.paths import GOLDEN
from tools.runs import stepwise

FOLDERS = [GOLDEN.parent / "quantised" / name for name in ("mxfp4", "gptq-experts")]


def loaded(folder: Path) -> tuple[Model, dict[str, Any]]:
    config, backend = load_config(folder), CudaBackend("f32", gpu=FakeGpu(emulate=True))
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    backend.end_loading()
    return Model(folder, config, None, Engine(backend, config, weights, 64, 128), Settings()), weights


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded(folder)
    with np.load(folder / "golden.npz") as golden:
        prompt, wanted = golden["prompt_1"].tolist(), golden["logits_1"]
    for few in (32, 0):  # pairs up to which blocks are streamed
        monkeypatch.setattr(experts_packed, "WAYS", Ways(streamed=few))
        assert np.abs(model.logits(prompt) - wanted).max() <= 2e-3
    assert np.abs(stepwise(model, prompt[:4]) - wanted[:4]).max() <= 2e-3


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_experts_are_packed_as_numpy_packs_them(folder: Path) -> None:
    stored, (_, found) = load_weights(folder, load_config(folder)), loaded(folder)
    names = [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(names) == 4
    for name in names:
        assert isinstance(found[name], Packed)
        wanted = packed(stored[name].stored(np.dtype(np.float32)))
        assert found[name].shape == wanted.shape == stored[name].shape
        (ours,), (theirs,) = found[name].segments, wanted.segments
        assert ours.rows == theirs.rows
        assert np.array_equal(np.asarray(ours.data), theirs.data)


def test_a_plan_counts_what_is_packed() -> None:
    weight, f32 = load_weights(FOLDERS[0], load_config(FOLDERS[0]))["0.experts.gate_up_proj"], np.dtype(np.float32)
    assert weight.device_bytes(f32) == packed(weight.stored(f32)).segments[0].data.nbytes
