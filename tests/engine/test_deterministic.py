"""``deterministic=True`` in 16 bits: a text is the same, bit for bit, whatever runs beside it. On the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama import Model
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.engine.engine import Engine
from cuplama.errors import DeviceError, ParameterError
from cuplama.generation_config import Settings
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from tests.fakes import FakeGpu, HostCublas
from tests.paths import GOLDEN

PROMPT = np.random.default_rng(1).integers(0, 90, 21).tolist()
OTHERS = [np.random.default_rng(i).integers(0, 90, 3 + 7 * i).tolist() for i in range(2, 5)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 3}


def _model(case: str, cublas: Any = None, chunk: int = 16, **options: Any) -> Model:
    folder = GOLDEN / case
    config = load_config(folder)
    backend = CudaBackend("bf16", gpu=FakeGpu(emulate=True, cublas=cublas), deterministic=True)
    backend.prefill_chunk = chunk
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    return Model(folder, config, None, Engine(backend, config, weights, 64, 64 * 4, **options), Settings())


def _bits(completion: cuplama.Completion) -> list[Any]:
    """Tokens with their log-probabilities, and those of the most probable ones."""
    assert completion.logprobs is not None
    return [(t.id, t.logprob, t.top) for t in completion.logprobs]


@pytest.mark.parametrize(("case", "cublas"), [("llama3-gqa", None), ("qwen3", HostCublas()), ("qwen35", None)])
def test_a_text_depends_neither_on_its_batch_nor_on_how_its_tokens_came(case: str, cublas: Any) -> None:
    with _model(case, cublas) as model:
        alone = _bits(model.generate(PROMPT, max_tokens=6, **GREEDY))
        batch = model.generate([*OTHERS, PROMPT], max_tokens=6, **GREEDY)
        assert _bits(batch[-1]) == alone
        for cut in (1, 5):  # what a step has computed is read again as a prompt
            longer = [*PROMPT, *(token for token, *_ in alone[:cut])]
            assert _bits(model.generate(longer, max_tokens=6 - cut, **GREEDY)) == alone[cut:]
    with _model(case, cublas, chunk=512, kv_cache_dtype="auto") as model:  # the whole prompt at once
        assert _bits(model.generate(PROMPT, max_tokens=6, **GREEDY)) == alone


def test_a_cache_of_8_bits() -> None:
    with _model("llama3-gqa", kv_cache_dtype="fp8") as model:
        alone = _bits(model.generate(PROMPT, max_tokens=4, **GREEDY))
        assert _bits(model.generate([OTHERS[0], PROMPT], max_tokens=4, **GREEDY)[1]) == alone
        longer = [*PROMPT, *(token for token, *_ in alone[:2])]
        assert _bits(model.generate(longer, max_tokens=2, **GREEDY)) == alone[2:]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "numpy"}, DeviceError, "deterministic=True needs a GPU: NumPy's sums depend on how many tokens"),
        ({"activations": "fp8"}, ParameterError, "activations = 'fp8' rounds .* it must be auto"),
        ({"deterministic": 1}, ParameterError, "deterministic = 1 is an int; it must be True or False"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cuplama.load(**{"deterministic": True, **options})


def test_rotations_that_follow_the_length_of_a_text_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"context = 100: beyond 32 tokens the model.s rotations .* at most 32"):
        cuplama.load(GOLDEN / "llama-rope-dynamic", deterministic=True, context=100)


def test_without_a_gpu_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (False, "there is no driver"))
    with pytest.raises(DeviceError, match=r"needs a GPU: .* device cuda cannot be used: there is no driver"):
        cuplama.load(deterministic=True)
