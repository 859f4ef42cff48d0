"""Models with an adapter as the GPU runs them, on the emulator: passes, steps and replays, plain and quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.peft import load_adapter
from cuplama.models.rounding import round_weights
from tests.adapters import LORA
from tests.fakes import FakeGpu
from tests.paths import GOLDEN
from tools.runs import stepwise

FOLDERS = [LORA / name for name in ("llama3-gqa", "gpt2", "mistral-window")]  # some of a stack, one matrix, the head


def _load(folder: Path, dtype: str, quantize: str | None = None) -> Model:
    case = GOLDEN / folder.name
    config, backend = load_config(case), CudaBackend(dtype, gpu=FakeGpu(emulate=True))
    weights = load_weights(case, config)
    if quantize is not None:
        weights = round_weights(weights, config, quantize)
    config, more = load_adapter(folder, config)
    loaded = {name: backend.load_weight(w) for name, w in (weights | more).items()}
    return Model(case, config, None, Engine(backend, config, loaded, 64, 128), Settings())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_logits_of_prompts_and_steps(folder: Path) -> None:
    model = _load(folder, "f32")
    with np.load(folder / "golden.npz") as golden:
        prompt, wanted = golden["prompt_1"].tolist(), golden["logits_1"]
    for logits in (model.logits(prompt), stepwise(model, prompt)):
        np.testing.assert_allclose(logits, wanted, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_replays_of_a_batch_and_of_steps() -> None:
    """Prompts are captured at their third pass, steps at their second."""
    folder = LORA / "llama3-gqa"
    model = _load(folder, "f32")
    greedy: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    with np.load(folder / "golden.npz") as golden:
        prompts = [golden[f"prompt_{j}"].tolist() for j in (1, 0)]
    with cuplama.load(GOLDEN / folder.name, device="numpy", adapter=folder) as plain:
        wanted = [c.tokens for c in plain.generate(prompts, **greedy)]
    for _ in range(3):
        assert [c.tokens for c in model.generate(prompts, **greedy)] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_an_adapter_of_a_quantised_model_in_16_bits(dtype: str) -> None:
    folder = LORA / "llama3-gqa"
    model = _load(folder, dtype, "int8")
    with np.load(folder / "golden.npz") as golden:
        prompt, plain = golden["prompt_1"].tolist(), golden["logits_1"]
    with cuplama.load(GOLDEN / folder.name, device="numpy", quantize="int8", adapter=folder) as m:
        wanted = m.logits(prompt)
    with cuplama.load(GOLDEN / folder.name, device="numpy", quantize="int8") as m:
        change = np.linalg.norm(m.logits(prompt) - plain)
    for logits in (model.logits(prompt), stepwise(model, prompt)):
        assert np.linalg.norm(logits - wanted) < 0.03 * change
