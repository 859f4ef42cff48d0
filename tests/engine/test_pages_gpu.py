"""Calls that share a cache too small for all on a GPU, with steps queued ahead: each gives what it gives alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import cuplama
from cuplama import Completion, Model, SamplingParams
from cuplama.backends.cuda.driver import cuda_available
from cuplama.errors import DeviceError

pytestmark = pytest.mark.gpu

CONTEXT = 512  # tokens of a sequence and of the whole cache: two runs of that length do not fit
PROMPTS = ["Once upon a time", "Lily and Tom went to the park.", "The little dog"]
PARAMS = {
    "greedy": SamplingParams(max_tokens=None, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=None, ignore_eos=True, temperature=1.0, top_p=0.95, seed=7),
    "penalised": SamplingParams(
        max_tokens=None, ignore_eos=True, temperature=0.8, seed=3, repetition_penalty=1.1, frequency_penalty=0.1
    ),
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    with cuplama.load(device="cuda", dtype="float32", context=CONTEXT) as model:
        yield model


@pytest.fixture(params=PARAMS)
def params(request: pytest.FixtureRequest, model: Model) -> Iterator[SamplingParams]:
    yield PARAMS[request.param]
    assert model.engine.cache.free == model.engine.cache.pages


def alone(model: Model, params: SamplingParams) -> list[list[int]]:
    """The tokens of each prompt, from steps that are replayed."""
    for prompt in PROMPTS:
        model.generate(prompt, params)
    return [model.generate(prompt, params).tokens for prompt in PROMPTS]


def test_streams_inside_of_each_other(model: Model, params: SamplingParams) -> None:
    wanted = alone(model, params)
    found: list[list[int]] = [[], [], []]
    for i, outer in enumerate(model.stream(PROMPTS[0], params)):
        found[0].append(outer.token.id)
        for j, middle in enumerate(model.stream(PROMPTS[1], params) if i == 100 else ()):
            found[1].append(middle.token.id)
            for inner in model.stream(PROMPTS[2], params) if j == 300 else ():
                found[2].append(inner.token.id)
    assert found == wanted


def test_two_streams_in_turn(model: Model, params: SamplingParams) -> None:
    prompts = [7] * 400, [9] * 400
    wanted = [model.generate(prompt, params, max_tokens=40).tokens for prompt in prompts]
    streams = [model.stream(prompt, params, max_tokens=40) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for _ in range(41):
        for tokens, stream in zip(found, streams, strict=True):
            with contextlib.suppress(StopIteration):
                tokens.append(next(stream).token.id)
    assert found == wanted


def test_threads(model: Model, params: SamplingParams) -> None:
    wanted = alone(model, params)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: model.generate(PROMPTS[i % 3], params).tokens, range(12)))
    assert found == [wanted[i % 3] for i in range(12)]


def test_a_stream_that_nobody_reads_on(model: Model, params: SamplingParams) -> None:
    """Another thread gets its pages, a batch and logits are computed meanwhile, and the stream goes on as before."""
    wanted = alone(model, params)
    stream = model.stream(PROMPTS[0], params)
    first = [next(stream).token.id for _ in range(450)]

    def other() -> Completion:
        return model.generate(PROMPTS[1], params)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result(60).tokens == wanted[1]
    assert [c.tokens for c in model.generate(PROMPTS, params)] == wanted
    assert len(model.logits([5] * CONTEXT)) == CONTEXT
    assert first + [delta.token.id for delta in stream] == wanted[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused(model: Model) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                model.generate("x")
            except DeviceError:
                status = 0
            model.close()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert model.generate(PROMPTS[0], max_tokens=3).tokens
