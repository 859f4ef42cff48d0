"""What the generic test does not see: the kernels of older GPUs, and that nothing around a sequence changes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, dtype_name
from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload
from cuplama.ops.abstract import attributes
from cuplama.ops.attention import HEAD_DIMS
from cuplama.ops.launch import Device
from cuplama.ops.op import Op
from cuplama.ops.self_attention import self_attention, self_attention_backward, self_attention_case

from . import harness

Inputs = dict[str, Any]

# What is built differently: Hopper, Ampere, a GPU with less shared memory, and one without such tensor cores.
HOPPER, AMPERE, SMALL, TURING = Device(90), Device(80, 108, 166912), Device(86, 84, 101376), Device(75, 40, 65536)
BOTH = (self_attention, self_attention_backward)


def _inputs(op: Op, case: harness.Case, T: str) -> Inputs:
    found = op.random_inputs(np.random.default_rng(3), case, DTYPES[T])
    return {name: array for name, array in found.items() if array is not None}


def _workload(op: Op, ins: Inputs, case: harness.Case) -> Workload:
    T = ins["x"].dtype
    return Workload(op, tuple(ins.get(s.name) for s in op.signature.ins), attributes(op, case, T), dtype_name(T))


def _run(op: Op, ins: Inputs, case: harness.Case, device: Device = HOPPER, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    workload = _workload(op, ins, case)
    return run_guarded(workload, workload.arrays(), EmulatedDevice(device, seed=seed))


def _same(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a, b, strict=True))


_KERNELS = [
    ("bf16", AMPERE, self_attention_case(4, 1, 64, [150, 0, 9])),
    ("f16", AMPERE, self_attention_case(3, 1, 64, [70, 1], window=33)),
    ("bf16", AMPERE, self_attention_case(2, 1, 128, [65, 3], window=40)),
    ("f16", AMPERE, self_attention_case(8, 1, 96, [33], empty=2)),
    ("bf16", AMPERE, self_attention_case(2, 1, 144, [40])),
    ("f16", SMALL, self_attention_case(2, 2, 256, [35])),
    ("bf16", SMALL, self_attention_case(2, 1, 128, [70])),
    ("bf16", Device(120, 170, 101376), self_attention_case(4, 2, 64, [70])),
    ("f16", TURING, self_attention_case(4, 2, 64, [40, 30], window=9)),
    ("f32", TURING, self_attention_case(2, 1, 128, [40, 3])),
    ("f32", HOPPER, self_attention_case(2, 1, 128, [70])),
    ("bf16", HOPPER, self_attention_case(2, 1, 512, [20, 3])),
    ("bf16", AMPERE, self_attention_case(4, 2, 64, [70, 5], window=40, softcap=1.5, sinks=True)),
    ("f16", TURING, self_attention_case(4, 2, 64, [70, 5], window=40, softcap=1.5, sinks=True)),
]


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize(("T", "device", "case"), _KERNELS, ids=lambda x: str(getattr(x, "arch", "")) or None)
def test_kernels_of_every_gpu(op: Op, T: str, device: Device, case: harness.Case) -> None:
    workload = _workload(op, _inputs(op, case, T), case)
    harness.check_launches(workload, device)
    check(workload, workload.arrays(), run_guarded(workload, workload.arrays(), EmulatedDevice(device)))


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALL, TURING], ids=lambda device: device.arch)
def test_every_head_size_fits(device: Device, D: int) -> None:
    """But for the largest on the oldest GPUs, which have too little shared memory."""
    for T in ("f32", "f16"):
        for op, largest in zip(BOTH, (480, 320), strict=True):
            if device is not TURING or largest >= D:
                case = self_attention_case(3, 1, D, [70])
                harness.check_launches(_workload(op, _inputs(op, case, T), case), device)


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize(("T", "D", "device"), [("f32", 16, HOPPER), ("bf16", 64, HOPPER), ("bf16", 32, AMPERE)])
def test_a_sequence_does_not_depend_on_the_batch(op: Op, T: str, D: int, device: Device, window: int) -> None:
    """Bit for bit, and nothing of another sequence, here NaN, comes through the mask."""
    case = self_attention_case(4, 2, D, [20, 50, 33], window=window)
    ins = _inputs(op, case, T)
    rows = slice(20, 70)
    mixed = {name: a.copy() for name, a in ins.items()}
    for name in ("x", "y", "lse", "dy"):
        if name in mixed:
            mixed[name][:20] = mixed[name][70:] = np.nan
    mixed["cu_seqlens"] = np.array([0, 20, 20, 70, 103, 103, 103], np.int32)  # with sequences that are empty
    together = [a[rows] for a in _run(op, mixed, {**case, "b": 6}, device)]
    alone = {name: a[rows].copy() for name, a in ins.items()}
    alone["cu_seqlens"] = np.array([0, 50], np.int32)
    assert _same(_run(op, alone, {**case, "b": 1, "n": 50}, device), together)
    assert not any(np.isnan(a.astype(np.float32)).any() for a in together)


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("seed", [1, 2])
def test_thread_order_does_not_matter(op: Op, seed: int) -> None:
    for T, D, device in (("f32", 16, HOPPER), ("f16", 144, AMPERE), ("bf16", 64, HOPPER)):
        case = self_attention_case(3, 1, D, [40, 7])
        ins = _inputs(op, case, T)
        assert _same(_run(op, ins, case, device, seed), _run(op, ins, case, device))


def test_the_gradient_of_repeated_heads_is_a_sum() -> None:
    """Four query heads on one key head are four key heads that are equal: their gradients add up."""
    grouped, single = self_attention_case(4, 1, 16, [40]), self_attention_case(4, 4, 16, [40])
    ins = _inputs(self_attention_backward, grouped, "f32")
    q, k, v = np.split(ins["x"], [64, 80], axis=1)
    (dx,) = _run(self_attention_backward, ins, grouped)
    (wide,) = _run(self_attention_backward, {**ins, "x": np.hstack([q, *[k] * 4, *[v] * 4])}, single)
    dk, dv = wide[:, 64:].reshape(40, 2, 4, 16).sum(2).transpose(1, 0, 2)
    np.testing.assert_allclose(dx, np.hstack([wide[:, :64], dk, dv]), rtol=1e-4, atol=1e-5)


def test_the_gradient_beside_sinks() -> None:
    """Sinks are not told to the backward pass: it has them in y and in lse. Against a difference quotient."""
    case = self_attention_case(4, 2, 8, [30, 7], window=9, softcap=0.8, sinks=True)
    ins = _inputs(self_attention, case, "f32")
    x, sinks = ins["x"].astype(np.float64), ins["sinks"].astype(np.float64)
    attrs = attributes(self_attention, case, DTYPES["f32"])

    def forward(x: np.ndarray[Any, Any]) -> Any:
        return self_attention.reference(x, ins["cu_seqlens"], sinks, **attrs)

    rng = np.random.default_rng(4)
    y, lse = forward(x)
    dy, direction = rng.standard_normal(y.shape), rng.standard_normal(x.shape)
    dx = self_attention_backward.reference(x, y, lse, dy, ins["cu_seqlens"], **attrs)
    ahead, behind = (float((forward(x + step * direction)[0] * dy).sum()) for step in (1e-5, -1e-5))
    np.testing.assert_allclose((dx * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6)
