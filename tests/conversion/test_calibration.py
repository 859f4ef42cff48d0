"""Calibration: a text through the graph layer by layer gives what the engine gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.numpy import NumPyBackend
from cuplama.conversion import calibration as module
from cuplama.conversion.calibration import Calibration, samples_of
from cuplama.conversion.source import layer_of
from cuplama.errors import DeviceError, PromptError
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.text.tokenizer import Tokenizer
from tests.conversion.made import TEXT, write_model
from tests.fakes import FakeGpu
from tests.paths import GOLDEN
from tests.tiny import CHARS


def _opened(folder: Path, samples: list[list[int]], spill: Path, backend: Any = None) -> tuple[Any, Any, Any]:
    config, backend = load_config(folder), backend or NumPyBackend()
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    backend.end_loading()
    found = Calibration(backend, config, samples, spill)
    found.embed(weights)
    return found, weights, config


def _of_layer(weights: dict[str, Any], layer: int) -> dict[str, Any]:
    return {name: w for name, w in weights.items() if layer_of(name) == layer}


@pytest.mark.parametrize("folder", ["llama", "gpt2-char", "gemma2", "olmo3", "cohere2", "granite"])
def test_behind_the_last_layer_is_what_the_engine_has_there(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each sample, in passes of several samples and with a rest; the stream in a file."""
    path = write_model(tmp_path / "model") if folder == "llama" else GOLDEN / folder
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    monkeypatch.setattr(NumPyBackend, "prefill_chunk", 50)
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 65, length).tolist() for length in (20, 17, 20, 20, 9)]
    found, weights, config = _opened(path, samples, tmp_path)
    for layer in range(config.num_layers):
        found.advance(layer, _of_layer(weights, layer))
    assert isinstance(found.x, np.memmap)
    with cuplama.load(path, device="numpy") as model:
        backend, at = model.backend, 0
        for sample in samples:
            head = {"hidden": np.asarray(found.x[at : at + len(sample)]), **weights}
            logits = backend.run(model.engine.runner.graph.head, head, ("logits",))["logits"]
            assert np.allclose(logits, model.logits(sample), atol=2e-4)
            at += len(sample)
        assert at == len(found.x)


def test_the_hessian_is_of_what_the_matrix_is_given(tmp_path: Path) -> None:
    samples = [list(range(20)), list(range(30, 47))]
    found, weights, _ = _opened(write_model(tmp_path / "model"), samples, tmp_path)
    x = np.asarray(found.x, np.float64)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights["0.attn_norm"]
    layer = _of_layer(weights, 0)
    assert np.allclose(found.hessian(0, "0.qkv_proj", layer), normed.T @ normed, rtol=1e-3, atol=1e-2)
    assert found.hessian(0, "0.down_proj", layer).shape == (96, 96)
    before = found.hessian(0, "0.o_proj", layer)
    after = found.hessian(0, "0.o_proj", layer | {"0.qkv_proj": 2 * layer["0.qkv_proj"]})
    assert np.trace(after) > 2 * np.trace(before)  # what is quantised first changes what comes next
    with pytest.raises(DeviceError, match=r"inputs of 0.down_proj are not finite in float32"):
        found.hessian(0, "0.down_proj", layer | {"0.mlp_norm": layer["0.mlp_norm"] * np.inf})


def test_samples_come_from_all_over_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(CHARS)
    ids = tokenizer.encode(TEXT)
    found = samples_of(TEXT, tokenizer, 4, 100)
    whole = len(ids) // 100
    assert [len(s) for s in found] == [100] * 4
    assert found[0] == ids[:100]
    assert found[-1] == ids[(whole - 1) * 100 : whole * 100]
    assert len(samples_of(TEXT, tokenizer, 10**6, 100)) == whole
    assert samples_of("To be", tokenizer, 4, 100) == [tokenizer.encode("To be")]
    with pytest.raises(PromptError, match="has no tokens"):
        samples_of("", tokenizer, 4, 100)


def test_of_a_long_text_no_more_is_read_than_is_needed() -> None:
    """Each sample begins with a word."""
    tokenizer = Tokenizer.load(CHARS)
    letters = "abcdefghij"
    words = ["".join(letters[int(digit)] for digit in f"{i:04}") for i in range(1000)]
    found = samples_of(" ".join(words), tokenizer, 3, 20)
    assert [len(s) for s in found] == [20] * 3
    texts = [tokenizer.decode(s) for s in found]
    starts = [words.index(text.split()[0]) for text in texts]
    assert starts[0] == 1
    assert all(300 < later - earlier < 370 for earlier, later in itertools.pairwise(starts))


def test_a_sample_begins_as_a_text_does() -> None:
    class WithBos:
        def encode(self, text: str, *, bos: bool = True) -> list[int]:
            return [*([1] if bos else []), *(ord(c) for c in text)]

    text = "abcdefghij"
    tokenizer: Any = WithBos()
    assert samples_of(text, tokenizer, 2, 5) == [[1, *map(ord, "abcd")], [1, *map(ord, "efgh")]]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "off"), [("f32", 1e-5), ("bf16", 0.02)])
def test_the_kernels_give_what_numpy_gives(dtype: str, off: float, tmp_path: Path) -> None:
    """On the emulator: Hessians, and the stream behind a layer."""
    path, samples = write_model(tmp_path / "model"), [list(range(20)), list(range(30, 50)), list(range(5, 12))]
    cuda = CudaBackend(dtype, gpu=FakeGpu(emulate=True))
    cuda.prefill_chunk = 40
    found: list[Any] = []
    expected: list[Any] = []
    for backend, values in ((cuda, found), (NumPyBackend(), expected)):
        calibration, weights, _ = _opened(path, samples, tmp_path, backend)
        layer = _of_layer(weights, 0)
        values += [calibration.hessian(0, name, layer) for name in ("0.qkv_proj", "0.o_proj", "0.down_proj")]
        calibration.advance(0, layer)
        values.append(calibration.x)
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) < off * np.linalg.norm(other)
