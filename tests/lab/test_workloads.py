"""The workloads of the lab: what a model's passes are made of, and the shapes that people ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.cli.kernels.options import parse_shape
from cuplama.dtypes import DTYPES
from cuplama.engine.decode import decode_step
from cuplama.engine.sampler import Needs, sampling_nodes
from cuplama.errors import ParameterError
from cuplama.lab.check import check_launches
from cuplama.lab.workloads import (
    Workload,
    decode_workloads,
    default_workloads,
    prompt_workloads,
    shape_workload,
)
from cuplama.models.config import load_config, parse_config
from cuplama.models.fusion import PREFILL_RULES, fuse
from cuplama.models.graph import decoder
from cuplama.models.presets import SHAPES, find_shape
from cuplama.ops import OPS
from cuplama.ops.abstract import AbstractArray
from cuplama.ops.launch import Device
from cuplama.ops.node import executable
from cuplama.ops.op import Op
from tests.lab.common import TINY
from tests.paths import GOLDEN


def _names(nodes: list[Any]) -> list[str]:
    return [node.op for node in executable(nodes)]


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("batch", [1, 16])
def test_every_node_of_both_passes_is_in_a_workload(name: str, batch: int) -> None:
    config = find_shape(name)[1]
    graph, greedy = decoder(config), sampling_nodes(Needs())
    step = _names(decode_step(graph, batch, greedy))
    found = decode_workloads(config, "bf16", batch)
    assert sum(w.count for w in found) == len(step)
    assert {w.op.name for w in found} == {*step} >= {"sample", "advance"}
    assert {w.op for w in found if w.graph == "decode"} == {w.op for w in found}
    prompt = prompt_workloads(config, "bf16", 512)
    nodes = fuse(graph.cut().body, PREFILL_RULES) + fuse(graph.cut().last, PREFILL_RULES)
    assert sum(w.count for w in prompt) == len(_names([*nodes, *greedy]))
    assert {w.graph for w in prompt} == {"prefill"}


def test_a_step_of_a_batch_has_its_inputs() -> None:
    """Sequences own different pages of the pool, the table is as wide as the context, and all see ``depth`` tokens."""
    config = parse_config(TINY)
    (attention,) = [w for w in decode_workloads(config, "f32", 3, 70, 200) if w.op.name == "append_attention"]
    arrays = dict(zip((s.name for s in attention.op.signature.ins), attention.arrays(), strict=True))
    assert arrays["seq_lens"] is not None
    assert arrays["seq_lens"].tolist() == [70] * 3
    table, slots = arrays["page_table"], arrays["slot_mapping"]
    assert table is not None
    assert slots is not None
    assert table.shape == (3, 4)
    assert sorted(table.ravel().tolist()) == list(range(12))
    assert slots.tolist() == (table[:, 1] * 64 + 5).tolist()
    assert "length=70" in attention.shape


def test_the_matrices_of_a_decode_step_are_the_weights_of_the_model() -> None:
    config = find_shape("llama-3.2-1b")[1]
    found = decode_workloads(config, "bf16")
    read = sum(w.call.nbytes() * w.count for w in found if w.weights and w.op.name != "embedding")
    weights = sum(2 * int(np.prod(s)) for n, s in config.weight_shapes().items() if n != "embed_tokens")
    assert weights < read < 1.001 * weights  # and some activations
    by_weight = {w.weights: w.count for w in found if w.weights}
    layers = dict.fromkeys([("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)], 16)
    assert by_weight == {("embed_tokens",): 1, **layers, ("lm_head",): 1}


def test_a_long_prompt_is_cut_as_the_engine_cuts_it() -> None:
    config = find_shape("llama-3.2-1b")[1]
    found = [w for w in prompt_workloads(config, "bf16", 5000, 2048) if w.op.name == "attention"]
    assert [(w.call["n"], int(w.call.arrays["seq_lens"][0]), w.count) for w in found] == [  # type: ignore[index]
        (2048, 2048, 15), (2048, 4096, 15), (904, 5000, 15), (1, 5000, 1)
    ]  # fmt: skip
    heads = [w for w in prompt_workloads(config, "bf16", 5000, 2048) if "lm_head" in w.weights]
    assert [(w.call["n"], w.count) for w in heads] == [(1, 1)]


def test_windows_that_differ_are_different_workloads() -> None:
    config = parse_config(TINY)
    config = replace(config, layers=tuple(replace(x, window=w) for x, w in zip(config.layers, (0, 16), strict=True)))
    found = [w for w in decode_workloads(config, "f32", depth=100) if "attention" in w.op.name]
    assert [(w.attrs["window"], w.count) for w in found] == [(0, 1), (16, 1)]


# Ops of training whose own shapes are so large that drawing or computing inputs takes seconds.
_LARGE = {"adamw", "cross_entropy", "embedding_backward", "self_attention_backward", "softmax_mixture", "square_sum"}
_LARGE |= {name for name in OPS if name.startswith(("expert_linear", "rms_norm_add_norm_linear"))}


def test_pairs_of_rows_and_experts_fit_together() -> None:
    """They come of no input of the pass: the op makes them."""
    config = load_config(GOLDEN / "qwen3-moe")
    step, prompt = ("route_pairs", "expert_linear_combine"), ("route", "sort_pairs", "expert_linear")
    for found, own in ((decode_workloads(config, "f32", 4), step), (prompt_workloads(config, "f32", 30), prompt)):
        names = {w.op.name: w for w in found}
        assert names.keys() >= {"expert_linear_silu_mul", *own}
        for name in ("expert_linear_silu_mul", own[-1]):
            workload = names[name]
            _, _, pairs, offsets, *_ = workload.arrays()
            assert sorted(pairs) == list(range(len(pairs)))  # type: ignore[arg-type]
            assert (len(offsets), offsets[0], offsets[-1]) == (10, 0, len(pairs))  # type: ignore[arg-type, index]
            assert workload.weights[0].startswith("experts.")
            assert 0 < workload.bind(workload.arrays()).nbytes() < 4 * workload.call.nbytes()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _LARGE)) for n in OPS])
def test_every_op_has_default_workloads(name: str) -> None:
    found = default_workloads(OPS[name], "bf16")
    assert found
    assert {c.op.name for c in found} == {name} or OPS[name].kernels is None
    for case in found:
        assert case.call.nbytes() > 0
        assert name in case.label


def test_shapes_of_ones_own() -> None:
    case = shape_workload(OPS["rms_norm"], {"n": 3, "d": 4096}, "f16")
    assert case.shape == "n=3 d=4096"
    assert case.label == "rms_norm f16 n=3 d=4096"
    assert case.attrs == {"eps": 1e-5, "offset": 0}
    assert case.ins[1].dtype == np.float16
    long = shape_workload(OPS["attention"], {"b": 2, "length": 300, "num_heads": 4, "H": 2, "D": 64}, "f32")
    assert long.call.env["b"] == 2
    assert long.call.arrays["seq_lens"].tolist() == [300, 300]  # type: ignore[union-attr]
    assert "length=300" in long.shape
    for op, shape, message in (
        ("add", {"q": 1}, "add has no 'q'; it has d, n"),
        ("attention", {"n": 1}, "attention has no 'n'"),
    ):
        with pytest.raises(ParameterError, match=message):
            shape_workload(OPS[op], shape, "f32")


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("linear", "n=-1", "linear: n is -1, not a whole number of at least 1"),
        ("rms_norm", "n=0,d=64", "rms_norm: n is 0, not a whole number"),
        ("rms_norm", "n=1.5,d=64", "rms_norm: n is 1.5, not a whole number"),
        ("rms_norm", "n=true", "rms_norm: n is true, not a whole number"),
        ("rms_norm", "eps=true", "rms_norm: eps is true, not a finite number"),
        ("rms_norm", "eps=nan", "rms_norm: eps is nan, not a finite number"),
        ("linear", "b=3", "linear: b is 3, not true or false"),
        ("linear", "U=i32", "linear: U is i32, not T or f32 or bf16"),
        ("attention", "length=0", "attention: length is 0, not a whole number of at least 1"),
        ("attention", "window=-1", "attention: window is -1, not a whole number of at least 0"),
        ("attention", "num_heads=3,H=2", "attention needs num_heads % H == 0, not H=2, num_heads=3"),
        ("attention", "new=2,length=1", "attention needs new <= length, not length=1, new=2"),
        ("append_attention", "new=2", "append_attention needs new == 1, not new=2"),
        ("rope", "n=1,D=7", "rope needs 2 * h <= D, not D=7, h=32"),
        ("kv_append", "n=49", "kv_append needs n <= P * S, not P=3, S=16, n=49"),
        ("logprobs", "N=8", "logprobs needs N <= V, not N=8, V=7"),
        ("embedding", "n=1,d=99999999999", "embedding: d is 99999999999: too large"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(op: str, shape: str, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        shape_workload(OPS[op], parse_shape(shape), "bf16")
    assert message in str(caught.value)
    assert "Error" not in str(caught.value)


def test_a_shape_that_memory_cannot_hold_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:  # where memory is promised freely, really asking for so much ends the process
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Op, "random_inputs", short)
    with pytest.raises(ParameterError, match="add: the shape n=9,d=8 is too large: Unable to allocate 9 TiB"):
        shape_workload(OPS["add"], {"n": 9, "d": 8}, "f32")


def test_sizes_that_an_op_has_as_zero_may_be_zero() -> None:
    assert shape_workload(OPS["logprobs"], {"N": 0}, "f32").call["N"] == 0
    assert shape_workload(OPS["attention"], {"window": 0, "length": 3}, "f32").call["window"] == 0


def test_launches_are_checked_before_they_are_made() -> None:
    with pytest.raises(ParameterError, match="rms_norm: d is 100000; the kernel takes at most 16384"):
        check_launches(shape_workload(OPS["rms_norm"], {"d": 100000}, "bf16"), Device())
    many = shape_workload(OPS["logprobs"], {"b": 65536, "V": 8}, "f32")
    with pytest.raises(ParameterError, match=r"the shape is too large: logprobs_chunk.* needs grid \(1, 65536, 1\)"):
        check_launches(many, Device())
    check_launches(shape_workload(OPS["logprobs"], {"b": 65535, "V": 8}, "f32"), Device())


def test_random_inputs_keep_products_in_range() -> None:
    op = OPS["linear"]
    f16 = DTYPES["f16"]
    case = Workload(op, (AbstractArray((2, 4096), f16), AbstractArray((3000, 4096), f16), None), {"U": "T"}, "f16")
    x, w, b = case.arrays()
    assert b is None
    assert x is not None and w is not None  # noqa: PT018
    assert float(np.std(x.astype(np.float32) @ w.astype(np.float32).T)) == pytest.approx(1, abs=0.1)
    assert len({row.tobytes() for row in w}) == 3000
    other = case.arrays(seed=1)[0]
    assert other is not None
    assert not np.array_equal(x, other)
