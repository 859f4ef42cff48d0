"""Perplexity: every token scored once, with the context it is promised, against a direct computation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama import Model
from cuplama.errors import DeviceError, ParameterError, PromptError
from cuplama.lab.perplexity import Perplexity, perplexity
from tests.paths import GOLDEN

CHARS = GOLDEN / "gpt2-char"
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with cuplama.load(CHARS, device="numpy") as found:
        yield found


def direct(model: Model, ids: list[int], context: int, stride: int) -> list[float]:
    """Negative log-likelihood of every token but the first: token i in the first window that reaches it."""
    losses = []
    for i in range(1, len(ids)):
        start = max(0, -(-(i + 1 - context) // stride)) * stride
        assert start < i < start + context
        assert i - start >= min(i, context - stride)
        logits = model.logits(ids[start:i])[-1].astype(np.float64)
        losses.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[i]]))
    return losses


@pytest.mark.parametrize(
    ("window", "stride"),
    [(2, 1), (3, 2), (10, 1), (10, 3), (10, 9), (16, 8), (79, 40), (80, 79), (None, None), (20, None)],
)
def test_against_a_direct_computation(model: Model, window: int | None, stride: int | None) -> None:
    ids = model.encode(TEXT)
    size = 80 if window is None else window
    losses = np.array(direct(model, ids, size, size // 2 if stride is None else stride))
    found = perplexity(model, TEXT, window, stride)
    assert found.tokens == len(losses) == len(ids) - 1
    assert found.size == len(TEXT.encode())
    assert found.nats == pytest.approx(losses.sum(), rel=1e-5)
    assert found.nats_per_token == pytest.approx(losses.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / len(TEXT), rel=1e-5)
    error = math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(len(losses))
    assert found.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_size_of_a_pass_does_not_matter(model: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = perplexity(model, TEXT, 30, 11)
    monkeypatch.setattr(model.backend, "prefill_chunk", chunk)
    found = perplexity(model, TEXT, 30, 11)
    assert found.tokens == wanted.tokens
    assert found.nats == pytest.approx(wanted.nats, rel=1e-5)


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 12, 13, 14, 19, 20, 21])
def test_texts_as_long_as_a_window_or_so(model: Model, length: int) -> None:
    seen: list[tuple[int, int]] = []
    found = perplexity(model, TEXT[:length], 10, 4, lambda done, total: seen.append((done, total)))
    assert found.tokens == length - 1
    assert found.nats == pytest.approx(sum(direct(model, model.encode(TEXT[:length]), 10, 4)), rel=1e-5)
    assert seen[-1] == (length - 1, length - 1)
    assert seen == sorted(set(seen))


def test_what_cannot_be_scored(model: Model) -> None:
    for text in ("", "T"):
        with pytest.raises(PromptError, match="fewer than two tokens"):
            perplexity(model, text)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"window": 1}, "window = 1 is out of range; it must be from 2 to 80"),
        ({"window": 81}, "window = 81 is out of range"),
        ({"window": 0}, "window = 0"),
        ({"stride": 0}, "stride = 0 is out of range; it must be from 1 to 79"),
        ({"window": 10, "stride": 10}, "stride = 10 is out of range; it must be from 1 to 9"),
        ({"stride": -1}, "stride = -1"),
    ]
    for options, words in wrong:
        with pytest.raises(ParameterError, match=words):
            perplexity(model, TEXT, **options)
    assert model.engine.cache.free == model.engine.cache.pages


def test_a_context_of_one_token_is_named() -> None:
    with (
        cuplama.load(CHARS, device="numpy", context=1) as short,
        pytest.raises(ParameterError, match="context = 1 is too short; a window needs at least 2 tokens"),
    ):
        perplexity(short, TEXT)


@pytest.mark.filterwarnings("error")  # NumPy's too
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(model: Model, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tokens: list[int]) -> Iterator[Array]:
        yield np.full((len(tokens), model.config.vocab_size), value, np.float32)

    monkeypatch.setattr(model.engine, "logits", broken)
    with pytest.raises(DeviceError, match=r"logits are not finite in float32; --dtype float32 may help"):
        perplexity(model, TEXT)


def test_extremes() -> None:
    certain = Perplexity(tokens=5, nats=0.0, squares=0.0, size=5)
    assert (certain.perplexity, certain.error, certain.bits_per_byte) == (1.0, 0.0, 0.0)
    assert Perplexity(tokens=1, nats=2.0, squares=4.0, size=1).error == 0.0
    assert Perplexity(tokens=1, nats=1e4, squares=1e8, size=1).perplexity == math.inf


def test_a_trained_model_is_less_surprised(shared: Path) -> None:
    story = (shared / "corpora/split_tinystories_val.txt").read_text()[:1500].lower()
    with cuplama.load(shared / "models/stories260K", device="numpy") as model:
        sense = perplexity(model, story)
        nonsense = perplexity(model, story[::-1])
    assert sense.perplexity < 0.5 * nonsense.perplexity
