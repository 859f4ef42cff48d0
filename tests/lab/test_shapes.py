"""The shapes of a model's values, with letters."""

from __future__ import annotations

import re

import pytest

from cuplama.engine.decode import decode_nodes
from cuplama.lab.shapes import LETTERS, shapes
from cuplama.models.config import load_config
from cuplama.models.graph import decoder
from cuplama.models.presets import SHAPES, find_shape
from tests.paths import GOLDEN


@pytest.mark.parametrize("name", ["gpt2", "llama3-gqa", "phi3-longrope", "qwen3"])
@pytest.mark.parametrize("every_row", [False, True])
def test_every_value_of_a_graph_has_a_shape(name: str, every_row: bool) -> None:
    config = load_config(GOLDEN / name)
    graph, found = decoder(config), shapes(config, every_row)
    nodes = decode_nodes(graph, 1) if every_row else [*graph.body, *graph.selected_rows()]
    for node in nodes:
        for part in (node, *node.parts):
            assert {*part.ins, *part.outs} - {""} <= found.keys()
    assert found["logits"] == f"[{'n' if every_row else 'r'},{config.vocab_size}]:f32"
    assert found["x"] == f"[n,{config.hidden_size}]:f32"
    assert found["cu_seqlens"] == "[b+1]:i32"
    assert found["0.cache.k"] == f"[P,{config.num_kv_heads},64,{config.head_dim}]:f32"
    assert found["embed_tokens"] == f"[{config.vocab_size},{config.hidden_size}]:f32"


def test_no_size_of_a_known_model_is_taken_for_a_letter() -> None:
    stand_ins = {*LETTERS.values(), LETTERS["b"] + 1}
    assert len(stand_ins) == len(LETTERS) + 1
    for name in SHAPES:
        config = find_shape(name)[1]
        assert not stand_ins & {size for shape in config.weight_shapes().values() for size in shape}
        assert config.context not in stand_ins
        assert not re.search("1000[0-9]{3}", " ".join(shapes(config).values()))
