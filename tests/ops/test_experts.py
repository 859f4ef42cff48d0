"""What the cases of the ops of experts leave out: odd logits, and that a pair does not depend on the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.dtypes import Array
from cuplama.lab.check import BackendExecutor, Executor, check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device
from cuplama.ops.op import Op


def _workload(op: Op, ins: list[Any], attrs: dict[str, Any], T: str = "f32") -> Workload:
    return Workload(op, tuple(ins), attrs, T)


def _run(workload: Workload, device: Device | None = None) -> list[Array]:
    """On the emulator, and held to the reference."""
    arrays = workload.arrays()
    outs = run_guarded(workload, arrays, EmulatedDevice(device))
    check(workload, arrays, outs)
    return outs


# ---- routes ----------------------------------------------------------------------------------------------------------


def _routed(logits: Array, **attrs: Any) -> list[Array]:
    return _run(_workload(OPS["route"], [logits, None, None], attrs))


def test_equal_logits_go_by_the_lower_index() -> None:
    logits = np.zeros((2, 70), np.float32)
    logits[0, 1::2] = -0.0  # equal to 0
    logits[1, [69, 3, 40]] = 1
    experts, weights = _routed(logits, k=4)
    assert experts.tolist() == [[0, 1, 2, 3], [3, 40, 69, 0]]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_logits_that_one_score_hides_are_told_apart() -> None:
    logits = np.full((1, 40), 30, np.float32)  # the sigmoid of each is 1 in float32
    logits[0, 33] = 31
    experts, _ = _routed(logits, k=2, sigmoid=1)
    assert experts.tolist() == [[33, 0]]


def test_a_row_without_numbers_has_experts_all_the_same() -> None:
    """Different ones that exist, so that nothing is read from elsewhere; the weights say that something is wrong."""
    logits = np.random.default_rng(0).standard_normal((3, 33)).astype(np.float32)
    logits[0], logits[1, 7], logits[2] = np.nan, np.nan, -np.inf
    workload = _workload(OPS["route"], [logits, None, None], dict(k=3))
    experts, weights = run_guarded(workload, workload.arrays(), EmulatedDevice())
    assert experts[[0, 2]].tolist() == [[0, 1, 2]] * 2
    assert 7 not in experts[1]
    assert np.isnan(weights).all()


def test_experts_come_from_the_groups_that_are_kept() -> None:
    logits = np.array([[9, -9, 1, 2, 3, 3, 0, 5]], np.float32)  # groups of two: sums 0, 3, 6, 5
    bias = np.zeros(8, np.float32)
    attrs = dict(k=3, groups=4, kept=2, renormalise=0)
    scores = np.exp(logits[0]) / np.exp(logits[0]).sum()
    experts, weights = _run(_workload(OPS["route"], [logits, bias, None], attrs))
    assert experts.tolist() == [[0, 7, 6]]  # scores: 9 alone wins its group, then 5 and 0
    np.testing.assert_allclose(weights[0], scores[[0, 7, 6]], rtol=1e-5)


def test_a_bias_chooses_and_does_not_weigh() -> None:
    logits = np.array([[1, 2, 3, 4]], np.float32)
    bias = np.array([1, 0, 0, 0], np.float32)
    experts, weights = _run(_workload(OPS["route"], [logits, bias, None], dict(k=2, sigmoid=1, factor=3.0)))
    assert experts.tolist() == [[0, 3]]
    scores = 1 / (1 + np.exp(-np.array([1.0, 4.0])))
    np.testing.assert_allclose(weights[0], 3 * scores / scores.sum(), rtol=1e-6)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_the_most_pairs_are_sorted() -> None:
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 512, (8192, 8)).astype(np.int32)
    _run(_workload(OPS["sort_pairs"], [experts], dict(E=512)))


# ---- products --------------------------------------------------------------------------------------------------------


def _alone_and_among(executor: Executor, rows: int) -> tuple[Array, Array]:
    """What five pairs give alone, and among as many as there are rows, of two experts: bits."""
    op, sort = OPS["expert_linear_silu_mul"], OPS["sort_pairs"].reference
    x, w, _, _, b = case_workload(op, dict(n=rows, s=1, E=2, m=40, k=392, b=True), "bf16").arrays()
    assert x is not None
    experts = np.arange(rows, dtype=np.int32)[:, None] % 2
    few, outs = slice(37, 42), []
    for some in (few, slice(None)):
        workload = _workload(op, [x[some], w, *sort(experts[some], E=2), b], {}, "bf16")
        (y,) = run_guarded(workload, workload.arrays(), executor)
        check(workload, workload.arrays(), [y])
        outs.append(y.view(np.uint16))
    return outs[0], outs[1][few]


@pytest.mark.parametrize(("arch", "shared"), [(80, 166912), (90, 232448)])
def test_a_pair_does_not_depend_on_the_others(arch: int, shared: int) -> None:
    """Bit for bit, on a deterministic device, in tiles of few pairs and of 128 or more."""
    alone, among = _alone_and_among(EmulatedDevice(Device(arch, shared=shared, deterministic=True)), 400)
    assert np.array_equal(alone, among)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [150, 400, 2000])
def test_a_pair_does_not_depend_on_the_others_on_a_gpu(rows: int) -> None:
    """Products of every height add up in the same way: an emulator cannot know that of tensor cores."""
    works, reason = cuda_available()
    if not works:
        pytest.skip(reason)
    backend = CudaBackend("bf16", deterministic=True)
    alone, among = _alone_and_among(BackendExecutor(backend), rows)
    backend.close()
    assert np.array_equal(alone, among)


def test_only_chosen_experts_are_counted() -> None:
    op = OPS["expert_linear"]
    case = dict(n=9, s=2, E=7, m=40, k=136, b=True)
    few, more = (case_workload(op, {**case, "chosen": chosen}, "bf16").call.nbytes() for chosen in (2, 5))
    assert more - few == 3 * 2 * 40 * (136 + 1)
