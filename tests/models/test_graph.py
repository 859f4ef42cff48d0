"""The graph of a decoder: what each layer is given of the config and of the weights that a family has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.models.config import Layer, ModelConfig, load_config
from cuplama.models.graph import HIDDEN, LOGITS, decoder
from cuplama.models.rope import RopeTables
from cuplama.ops.node import Node
from tests.models.synthetic import (
    PARALLEL,
    POST_NORMS,
    SANDWICH,
    VARIANTS,
    model_of,
    synthetic,
    two_rotations,
    weights_of,
)
from tests.paths import GOLDEN

CONFIG = load_config(GOLDEN / "llama3-gqa")
TOKENS = [3, 17, 5, 60, 42, 8, 9, 31, 2]


def layer(config: ModelConfig, i: int = 0) -> list[Node]:
    """The nodes of a layer."""
    graph = decoder(config)
    first, last = (next(j for j, n in enumerate(graph.body) if s in n.outs) for s in graph.streams[i : i + 2])
    return list(graph.body[first + 1 : last + 1])


def ops(config: ModelConfig) -> str:
    return " ".join(n.op for n in layer(config))


def by_weight(config: ModelConfig) -> dict[str, Node]:
    """Weight -> the first node that reads it."""
    graph = decoder(config)
    return {name: n for n in reversed([*graph.body, *graph.head]) for name in n.ins if name in config.weight_shapes()}


def test_attention_has_the_heads_the_scale_and_the_window_of_its_layer() -> None:
    config = replace(CONFIG, head_dim=64, layers=(Layer(0, CONFIG.layers[0].rope), Layer(7, CONFIG.layers[0].rope)))
    found = [n.attrs for n in decoder(config).body if n.op == "attention"]
    assert found == [{"num_heads": config.num_heads, "window": window, "scale": 0.125} for window in (0, 7)]


@pytest.mark.parametrize("cached", [True, False])
def test_attention_has_the_scale_and_the_cap_of_the_config(cached: bool) -> None:
    config = synthetic(attention_scale=0.3, attention_cap=50.0)
    (found, *_) = [n.attrs for n in decoder(config, cached).body if n.op.endswith("attention")]
    assert (found["scale"], found["softcap"]) == (0.3, 50.0)


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


# -- where norms stand

ATTENTION, MLP = "linear rope kv_append attention linear", "linear silu_mul linear"


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({}, f"rms_norm {ATTENTION} add rms_norm {MLP} add"),
        (POST_NORMS, f"cast {ATTENTION} rms_norm_add cast {MLP} rms_norm_add"),
        (SANDWICH, f"rms_norm {ATTENTION} rms_norm_add rms_norm {MLP} rms_norm_add"),
        (PARALLEL, f"rms_norm {ATTENTION} add {MLP} add"),
        ({"flags": "parallel"}, f"rms_norm {ATTENTION} add rms_norm {MLP} add"),
    ],
)
def test_norms_stand_where_there_are_weights_for_them(weights: Mapping[str, Any], wanted: str) -> None:
    assert ops(synthetic(**weights)) == wanted


def test_a_norm_behind_a_sublayer_is_of_what_is_added() -> None:
    found = by_weight(synthetic(**POST_NORMS))
    assert found["0.attn_post_norm"].ins == ("0.o_proj.out", "0.attn_post_norm", "x")
    assert found["0.mlp_post_norm"].ins == ("0.down_proj.out", "0.mlp_post_norm", "0.x")
    assert found["0.gate_up_proj"].ins[0] == "0.x.cast"
    assert next(n for n in layer(synthetic(**POST_NORMS)) if n.outs == ("0.x.cast",)).ins == ("0.x",)


@pytest.mark.parametrize(("own_norm", "read"), [(True, "0.mlp_norm.out"), (False, "0.attn_norm.out")])
def test_parallel_sublayers_read_the_same_stream(own_norm: bool, read: str) -> None:
    found = by_weight(synthetic(flags="parallel", drop="" if own_norm else "mlp_norm"))
    assert found["0.gate_up_proj"].ins[0] == read
    if own_norm:
        assert found["0.mlp_norm"].ins[0] == found["0.attn_norm"].ins[0] == "x"
    assert layer(synthetic(flags="parallel"))[-1].ins == ("0.x", "0.down_proj.out")  # the sum of all three


def test_an_offset_is_given_to_every_norm() -> None:
    config = synthetic("attn_post_norm q_norm k_norm", family={"norm_offset": 1.0})
    norms = [n for n in (*decoder(config).body, *decoder(config).head) if "norm" in n.op]
    assert {n.op for n in norms} == {"rms_norm", "qk_norm", "rms_norm_add"}
    assert {n.attrs["offset"] for n in norms} == {1.0}
    assert not any("offset" in n.attrs for n in decoder(CONFIG).body)


# -- attention and activation


@pytest.mark.parametrize(("add", "op"), [("q_norm k_norm", "qk_norm"), ("q_norm k_norm wide", "qk_norm_wide")])
@pytest.mark.parametrize("after", [False, True])
def test_queries_and_keys_are_normalised_by_the_shape_of_the_weights(add: str, op: str, after: bool) -> None:
    config = synthetic(add, flags="qk_norm_after_rope" if after else "")
    order = f"rope {op}" if after else f"{op} rope"
    assert ops(config).startswith(f"rms_norm linear {order} kv_append")
    assert by_weight(config)["0.q_norm"].ins[1:] == ("0.q_norm", "0.k_norm")


def test_the_family_says_how_pairs_are_rotated() -> None:
    assert "rope_pairs" in ops(synthetic(family={"rope": "rope_pairs"})).split()


def test_each_rotation_has_tables_of_its_own() -> None:
    found = [n.ins[1:] for n in decoder(synthetic(layers=two_rotations())).body if n.op == "rope"]
    assert found == [("rope.rows", f"{name}.cos", f"{name}.sin") for name in ("rope", "rope1")]


def test_queries_are_scaled_by_their_positions_before_keys_are_kept() -> None:
    config = synthetic(query_temperature=0.1, query_context=64.0)
    assert "rope scale_queries kv_append" in ops(config)
    (node, *_) = [n for n in layer(config) if n.op == "scale_queries"]
    assert node.ins == ("0.rotated", "positions")
    assert (node.attrs["temperature"], node.attrs["context"]) == (0.1, 64.0)


def test_an_activation_is_given_the_numbers_that_it_learned() -> None:
    config = synthetic("act.alpha_p act.alpha_n up_proj", "gate_up_proj", activation="xielu")
    found = by_weight(config)["0.act.alpha_p"]
    assert (found.op, found.ins) == ("xielu", ("0.up_proj.out", "0.act.alpha_p", "0.act.alpha_n"))
    assert found.attrs == {"beta": 0.5, "eps": -1e-6}


# -- scales, by what they mean


def logits(config: ModelConfig, weights: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    with model_of(config, weights) as model:
        return model.logits(TOKENS)


def changed(
    weights: Mapping[str, np.ndarray[Any, Any]], ends: tuple[str, ...], factor: float
) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array * np.float32(factor) if name.endswith(ends) else array for name, array in weights.items()}


@pytest.mark.parametrize(
    ("knob", "ends"),
    [
        ("residual_scale", ("o_proj", "down_proj")),
        ("embedding_scale", ("embed_tokens",)),
        ("logits_scale", ("lm_head",)),
    ],
)
def test_a_scale_is_as_if_weights_were_multiplied(knob: str, ends: tuple[str, ...]) -> None:
    """With an eps that counts, which a scaled residual stream needs another one for."""
    config = synthetic(eps=0.05, embedding_scale=3.0 if knob == "residual_scale" else 1.0)
    weights = weights_of(config)
    wanted = logits(config, changed(weights, ends, 0.25))
    found = logits(replace(config, **{knob: 0.25}), weights)  # type: ignore[arg-type]
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=2e-5)


def test_a_sublayer_without_a_norm_reads_the_stream_unscaled() -> None:
    config = synthetic(drop="mlp_norm")
    weights = weights_of(config)
    wanted = logits(config, changed(weights, ("o_proj", "down_proj"), 0.5))
    found = logits(replace(config, residual_scale=0.5), weights)
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=2e-5)


def test_logits_are_scaled_then_limited() -> None:
    config = synthetic("lm_head.bias")
    weights = weights_of(config)
    plain = logits(config, weights)
    found = logits(replace(config, logits_scale=2.0, logits_cap=1.5), weights)
    np.testing.assert_allclose(found, 1.5 * np.tanh(2 * plain / 1.5), atol=1e-6)
    without = {**weights, "lm_head.bias": np.zeros_like(weights["lm_head.bias"])}
    np.testing.assert_allclose(plain - logits(config, without), np.tile(weights["lm_head.bias"], (9, 1)), atol=1e-5)


def test_a_model_of_two_rotations_has_the_tables_of_both() -> None:
    config = synthetic(layers=two_rotations())
    with model_of(config, weights_of(config)) as model:
        for name, rope in config.ropes.items():
            tables = RopeTables(rope, 64)
            assert np.array_equal(model.engine.runner.values[f"{name}.cos"], tables.cos)
            assert np.array_equal(model.engine.runner.values[f"{name}.sin"], tables.sin)


# -- a pass over a prompt, in parts, and decode steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_one_by_one_are_those_of_whole_passes(variant: str) -> None:
    config = synthetic(**VARIANTS[variant])
    with model_of(config, weights_of(config)) as model:
        found = model.generate(TOKENS, temperature=0.0, max_tokens=12, ignore_eos=True).tokens
        whole = model.logits([*TOKENS, *found])
    assert found == whole[len(TOKENS) - 1 : -1].argmax(-1).tolist()
