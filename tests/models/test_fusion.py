"""Fusion: what the rules make of every family's graph, and what they leave alone."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cuplama.engine.decode import decode_nodes
from cuplama.models.config import load_config
from cuplama.models.fusion import (
    ADDED_NORM_RULES,
    BATCH_RULES,
    EIGHT_BIT_RULES,
    FEW_ROWS_RULES,
    PREFILL_RULES,
    Rule,
    fuse,
)
from cuplama.models.graph import Graph, decoder
from cuplama.ops import OPS
from cuplama.ops.node import Node
from tests.models.synthetic import VARIANTS, synthetic
from tests.paths import GOLDEN

CASES = sorted(GOLDEN.iterdir())
# Families whose layers have nothing but what the rules name.
PLAIN = {
    "gpt2", "internlm2", "internlm3", "llama", "mistral", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip


def _leaves(nodes: list[Node]) -> list[Node]:
    return [leaf for node in nodes for leaf in (node.parts or (node,))]


def _step(graph: Graph) -> list[Node]:
    return [*graph.body, *graph.every_row()]


def _norm_pairs(nodes: Sequence[Node]) -> int:
    """Norms behind a sublayer with the norm ahead of the next one."""
    return sum((a.op, b.op) == ("rms_norm_add", "rms_norm") for a, b in itertools.pairwise(nodes))


def _norms_behind(nodes: Sequence[Node]) -> int:
    """Norms behind a sublayer that no product computes: alone, or with the norm ahead of the next sublayer."""
    return sum(node.op in ("rms_norm_add", "rms_norm_add_norm") for node in nodes)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_fusion_leaves_five_nodes_a_layer(case: Path) -> None:
    config = load_config(case)
    nodes = _step(decoder(config))
    fused = fuse(nodes, FEW_ROWS_RULES)
    assert _leaves(fused) == nodes
    # The embedding, and the head with its norm, are the other two.
    assert (len(fused) == 5 * config.num_layers + 2) == (config.family.model_type in PLAIN)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
def test_both_gelus_are_fused_with_what_is_before_them(activation: str) -> None:
    config = replace(load_config(next(c for c in CASES if c.name.startswith("gpt2"))), activation=activation)
    fused = fuse(_step(decoder(config)), FEW_ROWS_RULES)
    assert len(fused) == 5 * config.num_layers + 2
    assert sum(activation in {leaf.op for leaf in node.parts} for node in fused) == config.num_layers


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_many_rows_keep_their_norms_and_activations(case: Path) -> None:
    """A library multiplies then: it takes the residual sum with it, and nothing else. A norm behind takes the sum, and
    the norm ahead of the next sublayer, which reads it."""
    config = load_config(case)
    graph = decoder(config)
    shapes = config.weight_shapes()
    sums = set[str]() if "0.attn_post_norm" in shapes else {"linear_add"}
    shared = sum(f"{i}.shared.down_proj" in shapes for i in range(config.num_layers))  # what these give is added before
    sparse = sum(f"{i}.router" in shapes for i in range(config.num_layers))
    experts = {"combine_pairs"} if sums and sparse > shared else set[str]()
    whole = [*graph.body, *graph.selected_rows()]
    norms, step_norms = ({"rms_norm_add_norm"} if _norm_pairs(n) else set[str]() for n in (whole, _step(graph)))
    prefill, batch = fuse(whole, PREFILL_RULES), decode_nodes(graph, 9)
    assert _leaves(prefill) == whole
    assert {n.op for n in prefill if n.parts} == sums | experts | norms
    assert {n.op for n in batch if n.parts} == sums | experts | step_norms | {"append_attention"}
    for nodes in (prefill, batch):
        assert [n.op for n in nodes].count("linear_add") == (2 * config.num_layers - sparse) * len(sums)
        assert [n.op for n in nodes].count("add") == shared * len(sums)


@pytest.mark.parametrize("name", ["qwen35", "qwen35-moe", "qwen3-next"])
def test_all_inputs_of_a_gated_delta_rule_are_one_product_with_its_norm(name: str) -> None:
    config = load_config(GOLDEN / name)
    fused = fuse(_step(decoder(config)), FEW_ROWS_RULES)
    for i in config.delta_layers:
        reads = [node for node in fused if f"{i}.delta_in_proj.out" in node.ins]
        assert [node.op for node in reads] == ["causal_conv", "gated_delta", "gated_norm"]
        product = next(node for node in fused if f"{i}.delta_in_proj.out" in node.outs)
        assert (product.op, product.ins[1:]) == ("rms_norm_linear", (f"{i}.attn_norm", f"{i}.delta_in_proj"))


# Golden case -> nodes of a layer, where norms stand behind sublayers, and those of the step besides.
SANDWICHED = {
    "gemma2": (5, 4),  # embedding, its scale, the first layer's qkv, whose place the head has behind the last, softcap
    "gemma3": (5, 3),
    "glm4": (6, 2),  # neighbours are rotated, which the decode kernel does not do
    "gemma4-same": (6, 3),  # values are normalised
    "exaone4-full": (6, 3),
    "exaone4-hybrid": (6, 4),  # one layer has no rotation
    "olmo2": (7, 3),
    "olmo3": (7, 3),
}


@pytest.mark.parametrize("name", SANDWICHED)
def test_a_norm_behind_a_sublayer_is_computed_by_the_next_product(name: str) -> None:
    config = load_config(GOLDEN / name)
    nodes = _step(decoder(config))
    fused = fuse(nodes, FEW_ROWS_RULES)
    layer, more = SANDWICHED[name]
    assert len(fused) == layer * config.num_layers + more
    assert "rms_norm_add" not in {node.op for node in fused}
    added = [node for node in fused if node.op.startswith("rms_norm_add_")]
    assert len(added) == 2 * config.num_layers
    # Before the head it is the final norm's product, in f32; each gives the residual stream, which later nodes add to.
    assert (added[-1].op, added[-1].attrs["U"]) == ("rms_norm_add_norm_linear", "f32")
    for node, then in itertools.pairwise(added):
        assert node.outs[1] == then.ins[2]
    without = [rule for rule in FEW_ROWS_RULES if rule not in ADDED_NORM_RULES]
    assert _norms_behind(fuse(nodes, without)) == 2 * config.num_layers


@pytest.mark.parametrize("name", ["gemma3", "gemma4-same", "exaone4-full", "olmo2"])
def test_a_norm_behind_a_sublayer_is_computed_with_the_next_norm_of_many_rows(name: str) -> None:
    config = load_config(GOLDEN / name)
    graph = decoder(config)
    ops = Counter(node.op for node in graph.body)
    pairs = _norm_pairs(graph.body)
    fused = Counter(node.op for node in fuse(graph.body, PREFILL_RULES))
    assert fused["rms_norm_add_norm"] == pairs
    assert fused["rms_norm_add"] == ops["rms_norm_add"] - pairs
    assert fused["rms_norm"] == ops["rms_norm"] - pairs
    assert (pairs > 0) == (name in ("gemma3", "gemma4-same"))
    # Where activations are rounded to 8 bits, norms are computed with the products that read them.
    assert not any(node.op == "rms_norm_add_norm" for node in fuse(graph.body, EIGHT_BIT_RULES))


def test_other_inputs_and_attributes_of_a_norm_behind_a_sublayer_reach_the_fused_node() -> None:
    fused = fuse(_step(decoder(load_config(GOLDEN / "gemma4-shared"))), FEW_ROWS_RULES)
    scaled = [node for node in fused if node.op == "rms_norm_add_norm_linear" and node.ins[3]]
    assert [node.ins[3] for node in scaled] == [f"{i}.layer_scalar" for i in range(5)]
    gates = [node for node in fused if node.op == "rms_norm_add_linear"]
    assert [node.ins[-1] for node in gates] == [f"{i}.layer_input_gate" for i in range(5)]
    fused = fuse(_step(decoder(synthetic(**VARIANTS["sandwich"]))), FEW_ROWS_RULES)
    added = [node for node in fused if node.op.startswith("rms_norm_add_")]
    assert {node.attrs["offset"] for node in added} == {1.0}
    assert added[0].ins[:5] == ("0.o_proj.out", "0.attn_post_norm", "x", "", "0.mlp_norm")


@pytest.mark.parametrize(
    ("norm", "later"),
    [
        ({"eps": 1e-6}, ()),  # one op has one eps, and one offset
        ({"eps": 1e-5, "offset": 1.0}, ()),
        ({"eps": 1e-5}, ("h",)),  # another product of the norm
    ],
)
def test_norms_that_differ_or_are_read_again_stay(norm: dict[str, float], later: tuple[str, ...]) -> None:
    nodes = [
        Node("rms_norm_add", ("x1",), ("y0", "post", "x0"), {"eps": 1e-5}),
        Node("rms_norm", ("h",), ("x1", "g"), norm),
        Node("linear", ("y",), ("h", "w"), {"U": "T"}),
        *(Node("linear", ("z",), (name, "v"), {"U": "T"}) for name in later),
    ]
    assert fuse(nodes, ADDED_NORM_RULES)[0] == nodes[0]
    fused = fuse(nodes, FEW_ROWS_RULES)
    if later:  # both norms are one node, of which both products read
        assert [n.op for n in fused] == ["rms_norm_add_norm", "linear", "linear"]
    else:
        assert fused[0] == nodes[0]
    same = [nodes[0], replace(nodes[1], attrs={"eps": 1e-5, "offset": 0.0}), nodes[2]]  # 0 where it is left out
    assert [n.op for n in fuse(same, FEW_ROWS_RULES)] == ["rms_norm_add_norm_linear"]


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4"])
def test_prompts_training_and_many_rows_keep_the_norms_behind_sublayers(name: str) -> None:
    config = load_config(GOLDEN / name)
    graph = decoder(config)
    trained = fuse([*decoder(config, cached=False).body, *graph.every_row()], PREFILL_RULES)
    for nodes in (trained, fuse(_step(graph), PREFILL_RULES), decode_nodes(graph, 9), decode_nodes(graph, 1, True)):
        assert _norms_behind(nodes) == 2 * config.num_layers


def test_fusion_keeps_a_value_that_is_used_again() -> None:
    nodes = [
        Node("rms_norm", ("h",), ("x", "g"), {"eps": 1e-5}),
        Node("linear", ("y",), ("h", "w"), {"U": "T"}),
        Node("add", ("z",), ("h", "y"), {}),
    ]
    rules = [r for r in FEW_ROWS_RULES if r.parts[0] == "rms_norm"]
    assert [n.op for n in fuse(nodes, rules)] == ["rms_norm", "linear", "add"]


def test_a_choice_and_its_pairs_are_one_node_that_keeps_what_the_sum_needs() -> None:
    config = load_config(GOLDEN / "qwen2-moe")
    fused = fuse(_step(decoder(config)), FEW_ROWS_RULES)
    found = [node for node in fused if node.op == "route_pairs"]
    assert len(found) == sum(f"{i}.router" in config.weight_shapes() for i in range(config.num_layers)) > 0
    routed = "1.experts.chosen", "1.experts.weights"
    assert found[0].outs == ("1.experts.pairs", "1.experts.offsets", *routed)
    assert found[0].attrs["k"] == config.experts_per_token


def _combined(case: str) -> list[tuple[str, ...]]:
    """Of each layer of experts in a decode step the inputs of its last node but for those of the product: what gives
    weights, a bias, and what is added."""
    config = load_config(GOLDEN / case)
    fused = fuse(_step(decoder(config)), FEW_ROWS_RULES)
    found = [node for node in fused if node.op == "expert_linear_combine"]
    assert len(found) == sum(f"{i}.router" in config.weight_shapes() for i in range(config.num_layers)) > 0
    assert "expert_linear" not in {node.op for node in fused}
    for node in found:
        layer = node.ins[0].partition(".")[0]
        names = ("act", "down_proj", "pairs", "offsets")
        assert node.ins[:4] == tuple(f"{layer}.experts.{name}" for name in names)
    return [(node.outs[0], *node.ins[4:]) for node in found]


def test_experts_their_sum_and_the_residual_are_one_node() -> None:
    """A bias and the residual stream come to it; what a shared expert gives, in place of the stream; or nothing, where
    what a shared expert gives goes through a gate first."""
    biased = _combined("gpt-oss")[0]
    assert biased == ("1.x0", "0.experts.weights", "0.experts.down_proj.bias", "0.x")
    assert _combined("qwen3-moe")[0] == ("1.x0", "0.experts.weights", "", "0.x")
    assert _combined("dots1")[0][1:] == ("1.experts.weights", "", "1.shared.down_proj.out")
    assert _combined("qwen2-moe")[0] == ("1.experts.sum", "1.experts.weights")


def test_experts_stay_apart_from_their_sum_for_many_rows() -> None:
    graph = decoder(load_config(GOLDEN / "qwen3-moe"))
    for nodes in (decode_nodes(graph, 9), decode_nodes(graph, 1, deterministic=True)):
        assert "expert_linear_combine" not in {node.op for node in nodes}


def test_a_part_with_what_the_fused_op_lacks_is_not_fused() -> None:
    """Left out, an input or an attribute would be ignored: the result would be another one."""
    rotation = [
        Node("rope_pairs", ("r",), ("x", "rows", "cos", "sin"), {}),
        Node("kv_append", ("k", "v"), ("r", "slots", "k", "v")),
        Node("attention", ("y",), ("r", "k", "v", "starts", "lengths", "table"), {"window": 0}),
    ]
    assert [n.op for n in fuse(rotation, FEW_ROWS_RULES)] == ["rope_pairs", "append_attention"]
    norm = Node("rms_norm", ("h",), ("x", "g"), {"eps": 1e-5, "offset": 1.0})
    biased = Node("linear", ("y",), ("h", "w", "b"), {"U": "T"})
    for nodes, fused in (([norm, biased], "silu_mul"), ([norm, biased], "linear_add")):
        assert fuse(nodes, [Rule(("rms_norm", "linear"), fused)]) == nodes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rules", [FEW_ROWS_RULES, BATCH_RULES, PREFILL_RULES])
def test_fused_nodes_stand_for_the_nodes_of_any_model(variant: str, rules: Sequence[Rule]) -> None:
    nodes = _step(decoder(synthetic(**VARIANTS[variant])))
    fused = fuse(nodes, rules)
    assert _leaves(fused) == nodes
    for node in fused:
        signature = OPS[node.op].signature
        assert all(name or spec.optional for spec, name in zip(signature.ins, node.ins, strict=False))
        assert sum(not s.optional for s in signature.ins) <= len(node.ins)


def test_what_stands_between_rotation_and_cache_leaves_the_rest_to_be_fused() -> None:
    config = synthetic(**VARIANTS["attention"])
    found = [n.op for n in fuse(_step(decoder(config)), BATCH_RULES)]
    at = found.index("scale_queries")
    assert found[at - 1 : at + 2] == ["rope", "scale_queries", "append_attention"]


def test_a_norm_that_two_sublayers_read_stays() -> None:
    fused = fuse(_step(decoder(synthetic(**VARIANTS["parallel"]))), FEW_ROWS_RULES)
    assert [n.op for n in fused].count("rms_norm") == synthetic().num_layers
    assert [n.op for n in fused].count("linear_add") == 2 * synthetic().num_layers


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


def test_the_offset_of_norms_of_heads_reaches_the_attention_behind_them() -> None:
    config = synthetic(add="q_norm k_norm", family={"norm_offset": 1.0})
    found = [node for node in fuse(_step(decoder(config)), BATCH_RULES) if node.op == "append_attention"]
    assert [node.attrs["offset"] for node in found] == [1.0] * config.num_layers
