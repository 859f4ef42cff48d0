"""The runner: which passes are captured, and who closes what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.decode import DecodeLoop
from cuplama.engine.graphs import KEPT_CHUNKS
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.prefill import PrefillPass
from cuplama.engine.runner import Runner
from cuplama.engine.sequence import SequenceState
from cuplama.models.config import load_config
from cuplama.sampling_params import SamplingParams
from tests.paths import GOLDEN

CONFIG = load_config(GOLDEN / "llama3-gqa")


def _runner(pages: int = 4, chunk: int = 512) -> Runner:
    """A model of zeros, whose steps and passes are captured."""
    backend = NumPyBackend()
    backend.captures, backend.prefill_chunk = True, chunk
    weights = {name: np.zeros(shape, np.float32) for name, shape in CONFIG.weight_shapes().items()}
    return Runner(backend, CONFIG, weights, PagedCache(backend, CONFIG, pages), 2 * PAGE)


def _sequence(runner: Runner, tokens: int) -> SequenceState:
    s = SequenceState([1] * tokens, SamplingParams(seed=0, temperature=0.0), frozenset())
    runner.cache.extend(s.pages, tokens + 8)
    s.cached = tokens - 1
    return s


def test_a_loop_that_cannot_begin_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, closed = _runner(), list[DecodeLoop]()

    def fail(loop: DecodeLoop, *_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(DecodeLoop, "begin", fail)
    monkeypatch.setattr(DecodeLoop, "close", lambda loop: closed.append(loop))
    with pytest.raises(MemoryError):
        runner.begin_decode([_sequence(runner, 3)])
    assert len(closed) == 1
    assert len(runner.steps) == 0


def test_a_loop_is_kept_and_one_of_a_closed_runner_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner()
    key, loop = runner.begin_decode([_sequence(runner, 3)])
    runner.end_decode(key, loop)
    assert runner.begin_decode([_sequence(runner, 5)]) == (key, loop)
    runner.close()
    closed = list[DecodeLoop]()
    monkeypatch.setattr(DecodeLoop, "close", lambda loop: closed.append(loop))
    runner.end_decode(key, loop)
    assert (closed, len(runner.steps)) == ([loop], 0)
    assert (runner.values, runner.cache.arrays) == ({}, {})


def test_steps_of_one_kind_share_their_nodes() -> None:
    """Backends keep what they plan for a list of nodes."""
    runner = _runner()
    pairs = [runner.begin_decode([_sequence(runner, 3) for _ in range(n)]) for n in (1, 1, 2)]
    one, same, other = (loop for _, loop in pairs)
    assert one is not same
    assert one._nodes is same._nodes
    assert one._nodes is not other._nodes


def test_a_closed_loop_holds_neither_graph_nor_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, closed = _runner(), list[Any]()
    _, loop = runner.begin_decode([_sequence(runner, 3)])
    loop.launch()
    loop.read()
    monkeypatch.setattr(type(loop._graph), "close", lambda graph: closed.append(graph))
    loop.close()
    assert closed == [loop._graph]
    assert (loop._inputs.device, loop._outs) == ({}, {})


def test_room_for_the_rows_of_a_pass_is_made_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, asked = _runner(pages=4, chunk=32), list[int]()
    s = SequenceState([1] * 40, SamplingParams(seed=0), frozenset(), pages=[0, 1])
    with monkeypatch.context() as patch:
        patch.setattr(runner.passes, "make_room", asked.append)
        for _ in range(2):
            runner.forward(runner.batch([(s, 40)]))
    assert asked == [48, 48]  # before the capture, and as it is kept
    assert runner.passes.sizes == [(48, 1)]


@pytest.mark.parametrize(
    ("pages", "chunk", "rows"), [(4, 100, 128), (4, 4096, 256), (3, 4096, 192), (4, 16, 16), (40, 2048, 2048)]
)
def test_passes_are_kept_for_two_chunks_of_what_the_cache_holds(pages: int, chunk: int, rows: int) -> None:
    assert _runner(pages, chunk).passes.max_cost == KEPT_CHUNKS * rows


def test_a_pass_that_could_not_be_kept_is_not_captured() -> None:
    runner = _runner(pages=4, chunk=32)
    assert runner.passes.max_cost == 64
    for tokens, size in ((64, (64, 1)), (65, None), (1, (16, 1))):
        s = SequenceState([1] * tokens, SamplingParams(seed=0), frozenset(), pages=[0, 1])
        assert runner._captured_size(runner.batch([(s, tokens)])) == size
    runner.backend.captures = False
    assert runner._captured_size(runner.batch([(s, 1)])) is None


def test_a_prompt_has_more_rows_than_sequences() -> None:
    """As many rows as sequences are a decode step to the attention op."""
    runner = _runner()
    parts = [(SequenceState([1], SamplingParams(seed=0), frozenset(), pages=[0]), 1)] * 16
    assert runner._captured_size(runner.batch(parts[:15])) == (32, 16)
    assert runner._captured_size(runner.batch(parts)) == (32, 16)
    assert runner._captured_size(runner.batch(parts[:12])) == (16, 12)


def test_a_closed_pass_holds_neither_graph_nor_arrays() -> None:
    class Graph:
        closed = 0

        def replay(self) -> None: ...

        def close(self) -> None:
            self.closed += 1

    class Backend(NumPyBackend):
        def capture(self, body: Any, sharing: object = None) -> Any:
            body()
            return graph

    graph = Graph()
    done = PrefillPass(Backend(), lambda inputs: {"x": inputs["input_ids"]}, 16, 1, 2)
    assert done.replay().keys() == done.replay().keys() == {"x"}
    done.close()
    assert graph.closed == 1
    assert (done._inputs.device, done._hidden) == ({}, {})
    PrefillPass(Backend(), lambda inputs: {}, 16, 1, 2).close()  # one that was never replayed has no graph
    assert graph.closed == 1
