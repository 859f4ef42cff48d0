"""The stand-ins are no kinder than the hardware: late, full of garbage, and in order."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.ops import OPS
from tests.fakes import FakeGpu, HostCublas, LateNumPyBackend
from tests.paths import GOLDEN


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_memory_holds_garbage(dtype: str) -> None:
    array = np.asarray(FakeGpu().empty((3, 5), DTYPES[dtype]))
    if array.dtype.kind in "iu":
        assert (np.abs(array.astype(np.int64)) > 1 << 20).all()
    else:
        assert np.isnan(array.astype(np.float32)).all()


def test_nothing_is_done_before_something_waits() -> None:
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    ring, device = backend.host_ring((2, 4))
    graph = backend.capture(lambda: backend.write(device, np.full((2, 4), 7, np.int32)))
    event = graph.replay()
    assert not ring.any()
    event.synchronize()
    assert (ring == 7).all()
    x = backend.upload(np.arange(4, dtype=np.float32)[None])
    (y,) = backend.call(OPS["add"], [x, x], {})
    assert np.isnan(np.asarray(y)).all()
    np.testing.assert_array_equal(backend.download(y), [[0, 2, 4, 6]])


def test_an_event_waits_for_what_was_queued_before_it_alone() -> None:
    backend = LateNumPyBackend()
    ring, device = backend.host_ring((3, 1))
    graphs = [backend.capture(lambda i=i: device.__setitem__(i, i)) for i in range(3)]  # type: ignore[misc]
    events = [graph.replay() for graph in graphs]
    for event, done in ((None, 0), (events[1], 2), (events[0], 2), (events[2], 3)):
        if event is not None:
            event.synchronize()
        assert [int(token) for token in ring[:, 0] if token < 3] == list(range(done))


def _model(name: str) -> tuple[Model, list[list[int]], Any]:
    """A golden model on a device whose steps are late."""
    case = GOLDEN / name
    config, context = load_config(case), json.loads((case / "meta.json").read_text())["context"]
    backend, golden = LateNumPyBackend(), np.load(case / "golden.npz")
    weights = {name: backend.load_weight(w) for name, w in load_weights(case, config).items()}
    model = Model(case, config, None, Engine(backend, config, weights, context, 4 * context), Settings())
    return model, [golden[f"prompt_{j}"].tolist() for j in range(4)], golden


@pytest.mark.parametrize("name", ["llama3-gqa", "phi3-longrope", "gpt2"])
def test_tokens_are_read_once_their_step_has_ended(name: str) -> None:
    """Alone and in a batch, by loops that serve again: an event of the run before would let a token be read early."""
    model, prompts, golden = _model(name)
    greedy: dict[str, Any] = dict(max_tokens=24, temperature=0.0, ignore_eos=True)
    for _ in range(2):
        for j, prompt in enumerate(prompts):
            assert model.generate(prompt, **greedy).tokens == golden[f"greedy_{j}"].tolist()
    for j, completion in enumerate(model.generate(prompts, **greedy)):
        assert completion.tokens == golden[f"greedy_{j}"].tolist()


def test_a_stream_that_is_closed_early_leaves_no_step_behind() -> None:
    """Steps are in flight when it closes; the next run on the same loop must not take them for its own."""
    model, prompts, golden = _model("llama3-gqa")
    greedy: dict[str, Any] = dict(max_tokens=24, temperature=0.0, ignore_eos=True)
    for count in (1, 2, 5):
        stream = model.stream(prompts[1], **greedy)
        assert [next(stream).token.id for _ in range(count)] == golden["greedy_1"].tolist()[:count]
        stream.close()
        assert model.generate(prompts[2], **greedy).tokens == golden["greedy_2"].tolist()


def test_log_probabilities_are_of_their_own_step() -> None:
    model, prompts, _ = _model("llama3-gqa")
    plain = cuplama.load(GOLDEN / "llama3-gqa", device="numpy", context=model.engine.context, cache_tokens=1000)
    asked: dict[str, Any] = dict(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
    for a, b in zip(model.generate(prompts, **asked), plain.generate(prompts, **asked), strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
