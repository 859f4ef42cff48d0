"""A deterministic device: what an op gives for a row is the same, bit for bit, for any other number of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, dtype_name
from cuplama.engine.decode import decode_nodes
from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.models.graph import decoder
from cuplama.models.presets import find_shape
from cuplama.ops import OPS
from cuplama.ops.abstract import attributes
from cuplama.ops.attention import attention
from cuplama.ops.attention_cases import attention_case
from cuplama.ops.launch import Device
from cuplama.ops.lora import lora_add

HOPPER = Device(90, 5, deterministic=True)  # few multiprocessors: the packed kernels divide sums among blocks
AMPERE = replace(HOPPER, arch=80, shared=166912)
N = 66  # rows: more than a launch takes of a packed weight
CUTS = ((0, 1), (3, 5), (2, 10), (64, 66))

# Sizes of each op that a decode step or a prompt has, beside attention and kv_append.
CASES: dict[str, dict[str, Any]] = {
    "embedding": dict(n=N, d=200, V=9),
    "embedding_pos": dict(n=N, d=200, V=9, P=70),
    "rms_norm": dict(n=N, d=900, eps=1e-5),
    "rms_norm_add": dict(n=N, m=900, d=900, eps=1e-5, scalar=True),
    "layer_norm": dict(n=N, d=900, eps=1e-5),
    "qk_norm": dict(n=N, num_heads=3, num_kv_heads=1, D=80, eps=1e-6),
    "qk_norm_wide": dict(n=N, num_heads=3, num_kv_heads=1, D=80, eps=1e-6),
    "gated_norm": dict(n=N, H=3, V=80, m=240, eps=1e-6),
    "rope": dict(n=N, num_heads=3, num_kv_heads=1, D=80, h=40, R=70),
    "rope_pairs": dict(n=N, num_heads=3, num_kv_heads=1, D=80, h=20, R=70),
    "scale_queries": dict(n=N, num_heads=3, num_kv_heads=1, D=80, temperature=0.5, context=16),
    "silu_mul": dict(n=N, f=172),
    "gelu_tanh_mul": dict(n=N, f=172),
    "gelu_erf_mul": dict(n=N, f=172),
    "gelu_tanh_mul_part": dict(n=N, f=172, m=344, first=172),
    "gelu_tanh": dict(n=N, f=172),
    "gelu_erf": dict(n=N, f=172),
    "relu_squared": dict(n=N, f=172),
    "xielu": dict(n=N, f=172, beta=0.5, eps=-1e-6),
    "sigmoid_mul": dict(n=N, m=172),
    "scale": dict(n=N, d=900, factor=1.5),
    "linear": dict(n=N, m=70, k=264, b=True, U="T"),
    "linear_add": dict(n=N, m=70, k=264, b=True),
}
PACKED = [
    (HOPPER, "linear", dict(W="int4 g128 zero", U="f32")),
    (HOPPER, "linear_add", dict(W="Q4_K + Q6_K")),
    (AMPERE, "linear", dict(W="int8 ordered", U="T")),
]


def _part(given: Workload, first: int, last: int) -> Workload:
    """The workload of some of its rows."""
    specs = given.op.signature.ins
    ins = (
        x[first:last] if x is not None and (spec.dims or ("",))[0] == "n" else x
        for spec, x in zip(specs, given.arrays(), strict=False)
    )
    return replace(given, ins=tuple(ins))


def _run(given: Workload, device: Device, seed: int = 0) -> np.ndarray[Any, Any]:
    (y,) = run_guarded(given, given.arrays(), EmulatedDevice(device, check=False, seed=seed))
    return y


def _same_in_parts(given: Workload, device: Device) -> None:
    given = replace(given, ins=tuple(given.arrays()))
    whole = _run(given, device)
    check(given, given.arrays(), [whole])
    for seed, (first, last) in enumerate(CUTS):
        assert np.array_equal(_run(_part(given, first, last), device, seed), whole[first:last]), (first, last)


@pytest.mark.parametrize("T", ["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_the_other_rows(name: str, T: str) -> None:
    _same_in_parts(case_workload(OPS[name], CASES[name], T), HOPPER)


@pytest.mark.parametrize("T", ["f32", "bf16"])
@pytest.mark.parametrize("r", [16, 264])
def test_nor_with_an_adapter(T: str, r: int) -> None:
    case = dict(n=N, m=96, q=2 * r, r=r, scale=0.5, U="T")
    _same_in_parts(case_workload(lora_add, case, T), HOPPER)


@pytest.mark.parametrize(("device", "name", "case"), PACKED)
def test_nor_with_a_packed_weight(device: Device, name: str, case: dict[str, Any]) -> None:
    _same_in_parts(case_workload(OPS[name], dict(n=N, m=150, k=904, b=True, **case), "bf16"), device)


def test_nor_with_a_packed_weight_in_float32() -> None:
    _same_in_parts(case_workload(OPS["linear"], dict(n=11, m=150, k=392, b=True, W="Q4_K", U="f32"), "f32"), HOPPER)


@pytest.mark.parametrize(
    ("T", "C", "D", "device"),
    [
        ("f32", "T", 64, HOPPER),
        ("bf16", "T", 64, HOPPER),
        ("bf16", "T", 128, HOPPER),
        ("bf16", "T", 80, HOPPER),
        ("bf16", "T", 64, AMPERE),
        ("bf16", "e4m3", 64, HOPPER),
    ],
)
@pytest.mark.parametrize("window", [0, 37])
def test_a_decode_step_attends_as_a_prompt(T: str, C: str, D: int, device: Device, window: int) -> None:
    """The last tokens of three sequences, one by one as in a step, are what they are at the end of their prompts."""
    case = attention_case(4, 2, D, [50, 3, 150], [70, 33, 150], window=window, S=64, C=C)
    ins: dict[str, Any] = attention.random_inputs(np.random.default_rng(3), case, DTYPES[T])

    def attended(ins: dict[str, Any]) -> np.ndarray[Any, Any]:
        arrays = tuple(ins[spec.name] for spec in attention.signature.ins)
        return _run(Workload(attention, arrays, attributes(attention, case, DTYPES[T]), dtype_name(DTYPES[T])), device)

    ends: Any = ins["cu_seqlens"][1:]
    step = {**ins, "x": ins["x"][ends - 1], "cu_seqlens": np.arange(4, dtype=np.int32)}
    assert np.array_equal(attended(step), attended(ins)[ends - 1])


def test_tiles_of_a_prompt_have_one_height() -> None:
    case = attention_case(4, 1, 40, [400], [400], S=64)
    for device, heights in ((AMPERE, {64}), (replace(AMPERE, deterministic=False), {64, 128})):
        found = set()
        for n in (2, 400):
            given = case_workload(attention, {**case, "n": n, "new": [n], "seq_lens": [n]}, "bf16")
            assert attention.kernels is not None
            found.add(attention.kernels(given.call, replace(device, sms=1)).launches[0].constants["ROWS"])
        assert found == heights


def test_every_op_of_a_step_is_among_the_cases() -> None:
    for shape in ("llama-3.1-8b", "qwen3-8b", "gpt2"):
        graph = decoder(find_shape(shape)[1])
        for sequences in (1, 64):
            ops = {node.op for node in decode_nodes(graph, sequences, deterministic=True)}
            assert ops - CASES.keys() - {"attention", "kv_append"} == set()
