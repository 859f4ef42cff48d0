"""The inputs of a pass: what they are for ragged sequences, how they are padded, and that a graph reads no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.engine.batch import INPUTS, Batch, abstract_values, input_shapes
from cuplama.engine.kv_cache import PAGE
from cuplama.engine.sequence import SequenceState
from cuplama.models.config import load_config
from cuplama.models.graph import decoder
from cuplama.models.rope import Rope, RotationTables
from cuplama.ops.abstract import infer
from cuplama.sampling_params import SamplingParams
from tests.paths import GOLDEN

SPARE = 9
ROPE = RotationTables({"rope": Rope("default", 10000.0, 8, 256, 256, {})}, 256)


def _sequence(tokens: int, cached: int, pages: list[int]) -> SequenceState:
    s = SequenceState(list(range(tokens)), SamplingParams(seed=0), frozenset(), pages=pages)
    s.cached, s.slot = cached, pages[0]
    return s


def _batch(**options: Any) -> Batch:
    """Three of 70 tokens that are partly cached, all of 2, and one in the middle of a prompt."""
    parts = [(_sequence(70, 67, [4, 2]), 3), (_sequence(2, 0, [7]), 2), (_sequence(10, 1, [5]), 1)]
    return Batch.build(parts, ROPE, SPARE, **options)


def test_the_inputs_of_ragged_sequences() -> None:
    batch = _batch()
    wanted = {
        "input_ids": [67, 68, 69, 0, 1, 1],
        "positions": [67, 68, 69, 0, 1, 1],
        "slot_mapping": [2 * PAGE + 3, 2 * PAGE + 4, 2 * PAGE + 5, 7 * PAGE, 7 * PAGE + 1, 5 * PAGE + 1],
        "rope.rows": [67, 68, 69, 0, 1, 1],
        "cu_seqlens": [0, 3, 5, 6],
        "seq_lens": [70, 2, 2],
        "page_table": [[4, 2], [7, SPARE], [5, SPARE]],
        "state_slots": [4, 7, 5],
        "logit_rows": [2, 4],  # the third prompt is not through
        "last.input_ids": [69, 1],
        "last.rope.rows": [69, 1],
        "last.cu_seqlens": [0, 1, 2],
        "last.seq_lens": [70, 2],
        "last.page_table": [[4, 2], [7, SPARE]],
    }
    assert {name: array.tolist() for name, array in batch.arrays.items()} == wanted
    assert {array.dtype for array in batch.arrays.values()} == {np.dtype(np.int32)}
    assert (batch.rows, batch.sequences, dict(batch.tables)) == (6, 3, {})
    assert _batch(all_logits=True).arrays["logit_rows"].tolist() == [0, 1, 2, 3, 4, 5]


def test_padding_belongs_to_no_sequence() -> None:
    batch = _batch()
    host = {name: np.full(shape, -1, np.int32) for name, shape in input_shapes(8, 5, 4, 3).items()}
    batch.pad_into(host)
    assert host["slot_mapping"][6:].tolist() == [SPARE * PAGE] * 2
    assert host["cu_seqlens"].tolist() == [0, 3, 5, 6, 6, 6]
    assert host["seq_lens"].tolist() == [70, 2, 2, 0, 0]
    assert host["state_slots"].tolist() == [4, 7, 5, 0, 0]
    assert host["page_table"].tolist() == [[4, 2, 9, 9], [7, 9, 9, 9], [5, 9, 9, 9], [9] * 4, [9] * 4]
    for name, array in batch.arrays.items():
        assert np.array_equal(host[name][tuple(map(slice, array.shape))], array)
    assert not any((array == -1).any() for array in host.values())


def test_inputs_that_are_not_asked_for_are_left_out() -> None:
    host = {"seq_lens": np.zeros(3, np.int32)}
    _batch().pad_into(host)
    assert host["seq_lens"].tolist() == [70, 2, 2]


def test_dynamic_rope_brings_tables_of_its_own() -> None:
    dynamic = RotationTables({"rope": Rope("dynamic", 10000.0, 8, 16, 16, {"factor": 2.0})}, 64)
    batch = Batch.build([(_sequence(20, 0, [1]), 20)], dynamic, SPARE)
    assert batch.tables.keys() == {"rope.cos", "rope.sin"}
    assert batch.arrays["rope.rows"].tolist() == list(range(20))


@pytest.mark.parametrize("case", sorted(GOLDEN.iterdir()), ids=lambda p: p.name)
def test_a_graph_reads_weights_caches_tables_and_these_inputs(case: Path) -> None:
    """A name that no one fills would be found only when it runs; a shape that does not fit, only on its backend."""
    config = load_config(case)
    graph = decoder(config)
    cut = graph.cut()
    nodes = [*cut.body, *cut.last, *cut.rest, *graph.selected_rows()]
    values: dict[str, Any] = {**abstract_values(config, DTYPES["bf16"], input_shapes(7, 2, 3, 2), 9, 64)}
    given = set(values)
    calls = [call for _, call in infer(nodes, values, DTYPES["bf16"])]
    assert len(calls) == len(nodes)
    last = [call for node, call in zip(nodes, calls, strict=True) if "last.seq_lens" in node.ins]
    assert all((call["n"], call["b"]) == (2, 2) for call in last)
    end = max((*config.caches, *config.delta_layers))
    assert len(last) == sum(i not in config.delta_layers for i in range(end, config.num_layers))  # the last, and others
    assert values["logits"].shape == (2, config.vocab_size)
    read = {name for node in nodes for name in node.ins}
    # Learned positions and rotation exclude each other; few layers rotate behind the last keys and values.
    unused = given - read - {"rope.rows", "positions", "last.rope.rows", "last.input_ids"}
    unused -= set() if config.delta_layers else {"state_slots"}
    unused -= set() if last else {"last.cu_seqlens", "last.seq_lens", "last.page_table"}
    assert unused == set()
    assert {spec.name for spec in INPUTS} <= given
