"""The runner: which passes are captured, and who closes what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.decode import DecodeLoop
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.prefill import PrefillPass
from cuplama.engine.runner import Runner
from cuplama.engine.sampler import Needs
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


def test_a_loop_is_kept_and_one_of_a_closed_runner_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner()
    loop = runner.loop(1, Needs())
    assert runner.loop(1, Needs()) is not loop  # it is in use
    runner.keep(loop)
    assert [runner.loop(*key) is loop for key in ((2, Needs()), (1, Needs(top_n=0)), (1, Needs()))] == [False] * 2 + [
        True
    ]
    runner.close()
    closed = list[DecodeLoop]()
    monkeypatch.setattr(DecodeLoop, "close", lambda loop: closed.append(loop))
    runner.keep(loop)
    assert (closed, len(runner.steps)) == ([loop], 0)
    assert (runner.values, runner.cache.arrays) == ({}, {})


def test_steps_of_one_kind_share_their_nodes() -> None:
    """Backends keep what they plan for a list of nodes."""
    runner = _runner()
    one, same, other = (runner.loop(n, Needs()) for n in (1, 1, 2))
    assert one is not same
    assert one._forward is same._forward
    assert one._draw is same._draw
    assert one._forward is not other._forward


def test_a_closed_loop_holds_neither_graph_nor_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, closed = _runner(), list[Any]()
    loop = runner.loop(1, Needs())
    runner.begin(loop, [_sequence(runner, 3)])
    loop.launch()
    loop.read()
    (graph,) = loop.graphs
    monkeypatch.setattr(type(graph), "close", lambda graph: closed.append(graph))
    loop.close()
    assert closed == [graph]
    assert (loop._inputs.device, loop._outs) == ({}, {})


def test_all_captured_graphs_use_the_memory_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is busy at a time."""
    runner, shared = _runner(), list[Any]()
    capture = runner.backend.capture
    graphs = list[Any]()

    def captured(body: Any, sharing: Any = None) -> Any:
        shared.append(sharing)
        graphs.append(capture(body, sharing))
        return graphs[-1]

    monkeypatch.setattr(runner.backend, "capture", captured)
    s = SequenceState([1] * 3, SamplingParams(seed=0), frozenset(), pages=[0])
    for _ in range(2):
        runner.forward(runner.batch([(s, 3)]))
    runner.loop(1, Needs())
    runner.loop(1, Needs(masked=True))  # two graphs
    assert shared == [None, graphs[0], graphs[0], graphs[2]]  # the last one's memory is that of the one before it


def test_passes_of_more_rows_than_a_chunk_or_with_their_own_tables_are_not_captured() -> None:
    runner = _runner(pages=4, chunk=32)
    for tokens, size in ((32, (32, 1)), (33, None), (1, (16, 1))):
        s = SequenceState([1] * tokens, SamplingParams(seed=0), frozenset(), pages=[0, 1])
        assert runner._captured_size(runner.batch([(s, tokens)])) == size
    batch = runner.batch([(s, 1)])
    assert runner._captured_size(replace(batch, tables={"rope.cos": np.zeros(1)})) is None
    runner.backend.captures = False
    assert runner._captured_size(batch) is None


def test_a_prompt_has_more_rows_than_sequences() -> None:
    """As many rows as sequences are a decode step to the attention op."""
    runner = _runner()
    parts = [(SequenceState([1], SamplingParams(seed=0), frozenset(), pages=[0]), 1)] * 16
    assert runner._captured_size(runner.batch(parts[:15])) == (32, 16)
    assert runner._captured_size(runner.batch(parts)) == (32, 16)
    assert runner._captured_size(runner.batch(parts[:9])) == (32, 16)
    assert runner._captured_size(runner.batch(parts[:8])) == (16, 8)


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
