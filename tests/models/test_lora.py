"""What an adapter makes of a model: its weights, its nodes, and the values that belong to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.engine.batch import abstract_values, input_shapes
from cuplama.engine.decode import decode_nodes
from cuplama.models.config import ModelConfig, load_config
from cuplama.models.fusion import EIGHT_BIT_RULES, PREFILL_RULES, fuse
from cuplama.models.graph import LOGITS, decoder
from cuplama.models.lora import Adapter, LowRank
from cuplama.models.new_adapter import new_adapter
from cuplama.ops.abstract import infer
from tests.paths import GOLDEN

LLAMA = load_config(GOLDEN / "llama3-gqa")  # d 32, f 40, 4 heads and 2 KV heads of 8, 2 layers
Q, K, V = (f"model.layers.1.self_attn.{x}_proj" for x in "qkv")


def adapted(*modules: str, rank: int = 4, alpha: float = 6) -> ModelConfig:
    return replace(LLAMA, adapter=Adapter(dict.fromkeys(modules, LowRank(rank, alpha))))


def test_the_scale_is_that_of_lora_or_of_rslora() -> None:
    assert LowRank(4, 6).scale == 1.5
    assert LowRank(4, 6, rslora=True).scale == 3


def test_a_stack_has_an_a_for_every_part_and_b_is_stacked_as_its_rows_are() -> None:
    config = adapted(Q, V)
    own, found = LLAMA.weight_shapes(), config.weight_shapes()
    assert {name: shape for name, shape in found.items() if name not in own} == {
        "1.qkv_proj.lora_a": (12, 32),
        "1.qkv_proj.lora_b": (64, 4),
    }
    recipe = config.recipes()["1.qkv_proj.lora_b"]
    assert recipe.parts[1] == ("num_kv_heads*D,4", f"base_model.model.{K}.lora_B.weight")
    (name, part), *others = config.lora_parts().items()
    assert (name, others, part.dtype) == ("1.qkv_proj.lora_part", [], np.int32)
    assert part.tolist() == [0] * 32 + [1] * 16 + [2] * 16
    assert config.adapter is not None
    assert [config.adapter.stores(tensor) for _, tensor in recipe.parts] == [True, False, True]
    assert config.adapter.stores("model.norm.weight")


@pytest.mark.parametrize("name", ["llama3-gqa", "gpt2", "phi3"])
def test_an_adapter_has_so_many_numbers(name: str) -> None:
    """Where no part of a stack is left out, as many as its weights have."""
    config = new_adapter(load_config(GOLDEN / name), 3)
    assert config.adapter is not None
    own = config.own_recipes()
    sizes = {n: int(np.prod(s)) for n, s in config.weight_shapes().items() if n not in own}
    assert config.adapter.parameters(own, config.dims) == sum(sizes.values()) > 0
    assert adapted(Q).adapter.parameters(LLAMA.own_recipes(), LLAMA.dims) == 4 * (32 + 32)  # type: ignore[union-attr]


def test_only_layers_that_are_adapted_have_further_nodes() -> None:
    plain, config = decoder(LLAMA), adapted(Q, "lm_head")
    graph = decoder(config)
    more = [n for n in (*graph.body, *graph.head) if n.op == "lora_add"]
    assert [n.outs for n in more] == [("1.qkv_proj.out",), (LOGITS,)]
    attrs = [{**n.attrs} for n in more]
    assert attrs == [{"q": 12, "scale": 1.5, "U": "T"}, {"q": 4, "scale": 1.5, "U": "f32"}]
    assert len(graph.body) == len(plain.body) + 2
    assert more[0].ins[2:] == ("1.qkv_proj.lora_b", "1.qkv_proj.lora_part")
    ops = [n.op for n in fuse(graph.body, PREFILL_RULES)]
    assert ops.count("linear_add") == 4  # o_proj and down_proj of both layers are as they were


def test_what_is_adapted_is_not_fused_and_what_is_not_still_is() -> None:
    layer = "model.layers.0."
    config = adapted(f"{layer}self_attn.q_proj", f"{layer}self_attn.o_proj", f"{layer}mlp.gate_proj")
    for nodes in (decode_nodes(decoder(config), 1), fuse(decoder(config).body, EIGHT_BIT_RULES)):
        fused = {name for n in nodes if n.parts for name in n.ins}
        for name in ("0.qkv_proj", "0.o_proj", "0.gate_up_proj"):
            assert name not in fused
            assert any(n.op == "linear" and n.ins[1] == name for n in nodes)
        assert {"0.down_proj", "1.qkv_proj", "1.o_proj"} <= fused


@pytest.mark.parametrize("name", ["llama3-gqa", "gpt2", "qwen3", "phi3"])
def test_the_nodes_can_be_walked_without_arrays(name: str) -> None:
    """As the memory plan does: every value is described, in the dtype that the op asks for."""
    config = new_adapter(load_config(GOLDEN / name), 5)
    T, graph = DTYPES["bf16"], decoder(config)
    values = {**abstract_values(config, T, input_shapes(7, 2, 3, 2), 9, 64)}
    nodes = fuse([*graph.body, *graph.selected_rows()], PREFILL_RULES)
    calls = [call for _, call in infer(nodes, values, T)]  # type: ignore[arg-type]
    assert sum(call.op.name == "lora_add" for call in calls) == 4 * config.num_layers
    assert values[LOGITS].dtype == DTYPES["f32"]
