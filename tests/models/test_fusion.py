"""Fusion: what the rules make of every family's graph, and what they leave alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from cuplama.engine.decode import decode_nodes
from cuplama.models.config import load_config
from cuplama.models.fusion import FEW_ROWS_RULES, PREFILL_RULES, fuse
from cuplama.models.graph import Graph, decoder
from cuplama.ops.node import Node
from tests.paths import GOLDEN

CASES = sorted(GOLDEN.iterdir())


def _leaves(nodes: list[Node]) -> list[Node]:
    return [leaf for node in nodes for leaf in (node.parts or (node,))]


def _step(graph: Graph) -> list[Node]:
    return [*graph.body, *graph.every_row()]


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_fusion_leaves_five_nodes_a_layer(case: Path) -> None:
    config = load_config(case)
    nodes = _step(decoder(config))
    fused = fuse(nodes, FEW_ROWS_RULES)
    assert len(fused) == 5 * config.num_layers + 2  # the embedding, and the head with its norm
    assert _leaves(fused) == nodes


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
def test_both_gelus_are_fused_with_what_is_before_them(activation: str) -> None:
    config = replace(load_config(next(c for c in CASES if c.name.startswith("gpt2"))), activation=activation)
    fused = fuse(_step(decoder(config)), FEW_ROWS_RULES)
    assert len(fused) == 5 * config.num_layers + 2
    assert sum(activation in {leaf.op for leaf in node.parts} for node in fused) == config.num_layers


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_many_rows_keep_their_norms_and_activations(case: Path) -> None:
    """A library multiplies then: it takes the residual sum with it, and nothing else."""
    config = load_config(case)
    graph = decoder(config)
    whole = [*graph.body, *graph.selected_rows()]
    prefill, batch = fuse(whole, PREFILL_RULES), decode_nodes(graph, 9)
    assert _leaves(prefill) == whole
    assert {n.op for n in prefill if n.parts} == {"linear_add"}
    assert {n.op for n in batch if n.parts} == {"linear_add", "append_attention"}
    for nodes in (prefill, batch):
        assert [n.op for n in nodes].count("linear_add") == 2 * config.num_layers
        assert "add" not in {n.op for n in nodes}


def test_fusion_keeps_a_value_that_is_used_again() -> None:
    nodes = [
        Node("rms_norm", ("h",), ("x", "g"), {"eps": 1e-5}),
        Node("linear", ("y",), ("h", "w"), {"U": "T"}),
        Node("add", ("z",), ("h", "y"), {}),
    ]
    rules = [r for r in FEW_ROWS_RULES if r.parts[0] == "rms_norm"]
    assert [n.op for n in fuse(nodes, rules)] == ["rms_norm", "linear", "add"]


def test_inputs_are_matched_by_name() -> None:
    """An input that a part leaves out does not move the others; what another part calls alike is not taken for it."""
    nodes = [
        Node("linear", ("y",), ("x", "w"), {"U": "f32"}),  # without a bias, which ``add`` calls b as well
        Node("add", ("z",), ("residual", "y")),
    ]
    (fused,) = fuse(nodes, PREFILL_RULES)
    assert (fused.op, fused.ins, fused.outs) == ("linear_add", ("x", "w", "residual"), ("z",))
    norm = [
        Node("layer_norm", ("h",), ("x", "g", "shift"), {"eps": 1e-5}),
        Node("linear", ("y",), ("h", "w", "bias"), {"U": "T"}),
    ]
    (fused,) = fuse(norm, FEW_ROWS_RULES)
    assert fused.ins == ("x", "g", "shift", "w", "bias")
    attention = [
        Node("kv_append", ("k", "v"), ("x", "slots", "k", "v")),
        Node("attention", ("y",), ("x", "k", "v", "starts", "lengths", "table"), {"window": 0}),
    ]
    (fused,) = fuse(attention, FEW_ROWS_RULES)
    assert fused.ins == ("x", "slots", "k", "v", "starts", "lengths", "table")
    assert fused.outs == ("y", "k", "v")


def test_the_offset_of_a_norm_and_a_missing_shift_reach_the_fused_node() -> None:
    nodes = [
        Node("layer_norm", ("h",), ("x", "g"), {"eps": 1e-5, "offset": 1.0}),
        Node("linear", ("y",), ("h", "w", "b"), {"U": "f32"}),
    ]
    (fused,) = fuse(nodes, FEW_ROWS_RULES)
    assert fused.op == "layer_norm_linear"
    assert (fused.ins, dict(fused.attrs)) == (("x", "g", "", "w", "b"), {"eps": 1e-5, "offset": 1.0, "U": "f32"})


def test_a_gated_gelu_is_fused_with_what_is_before_it() -> None:
    config = replace(load_config(next(c for c in CASES if c.name == "llama3-gqa")), activation="gelu_tanh_mul")
    fused = fuse(_step(decoder(config)), FEW_ROWS_RULES)
    assert [node.op for node in fused].count("rms_norm_linear_gelu_tanh_mul") == config.num_layers
