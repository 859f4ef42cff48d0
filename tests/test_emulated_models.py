"""Whole models as the GPU runs them, on the emulator: planned launches, fused nodes, recorded steps, ragged batches.

The kernels' own text computes every family's golden tokens. What is missing here is the hardware: timing, streams and
the order of launches that overlap.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda import CudaBackend
from cuplama.checkpoint import load_weights
from cuplama.config import load_config
from cuplama.engine import Engine
from cuplama.model import Model

from .gpu.verify_models import kl, stepwise
from .test_cuda_backend import FakeGpu

CASES = sorted((Path(__file__).parent / "golden" / "cases").iterdir())


def _load(case: Path, dtype: str) -> tuple[Model, Any, dict[str, Any]]:
    meta = json.loads((case / "meta.json").read_text())
    config = load_config(case)
    backend = CudaBackend(dtype, gpu=FakeGpu(emulate=True))
    weights = {name: backend.load_weight(w) for name, w in load_weights(case, config).items()}
    engine = Engine(backend, config, weights, meta["context"], 2 * meta["context"])
    return Model(case, config, None, backend, engine, {}), np.load(case / "golden.npz"), meta


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_golden_tokens(case: Path) -> None:
    """A middling prompt, one that crosses the original context while decoding, one that begins beyond it; a batch."""
    model, golden, _ = _load(case, "f32")
    greedy: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    for j, count in ((1, 4), (2, 6), (3, 3)):
        done = model.generate(golden[f"prompt_{j}"].tolist(), max_tokens=count, **greedy)
        assert done.tokens == golden[f"greedy_{j}"].tolist()[:count]
    batch = model.generate([golden[f"prompt_{j}"].tolist() for j in (1, 0)], max_tokens=4, **greedy)
    assert [c.tokens for c in batch] == [golden[f"greedy_{j}"].tolist()[:4] for j in (1, 0)]


@pytest.mark.parametrize("case", CASES[::3], ids=lambda p: p.name)
@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_16_bit_logits(case: Path, dtype: str, name: str) -> None:
    """In one piece and by fused steps. transformers' divergence is a mean over more positions, hence the factor."""
    model, golden, meta = _load(case, dtype)
    prompt = golden["prompt_1"].tolist()
    for logits in (model.logits(prompt), stepwise(model, prompt)):
        assert kl(golden["logits_1"], logits).mean() <= 2 * meta["kl"][name]
