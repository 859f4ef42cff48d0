"""The graph of a decoder: what each layer is given of the config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cuplama.models.config import Layer, load_config
from cuplama.models.graph import HIDDEN, LOGITS, decoder
from tests.paths import GOLDEN

CONFIG = load_config(GOLDEN / "llama3-gqa")


def test_attention_has_the_heads_the_scale_and_the_window_of_its_layer() -> None:
    config = replace(CONFIG, head_dim=64, layers=(Layer(0, CONFIG.layers[0].rope), Layer(7, CONFIG.layers[0].rope)))
    found = [n.attrs for n in decoder(config).body if n.op == "attention"]
    assert found == [{"num_heads": config.num_heads, "window": window, "scale": 0.125} for window in (0, 7)]


def test_a_layer_without_a_rotation_does_not_rotate() -> None:
    config = replace(CONFIG, layers=(CONFIG.layers[0], Layer()))
    assert [n.op for n in decoder(config).body].count("rope") == 1


@pytest.mark.parametrize("rows", ["selected", "every"])
def test_the_head_ends_in_float32_logits(rows: str) -> None:
    graph = decoder(CONFIG)
    head = graph.selected_rows() if rows == "selected" else graph.every_row()
    assert (head[-1].outs, head[-1].attrs["U"]) == ((LOGITS,), "f32")
    assert head[0].ins[0] == graph.out
    assert any(HIDDEN in n.ins for n in head) == (rows == "selected")
