"""What the generic test does not see: a sequence's result is the same bit for bit whatever surrounds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, Array, dtype_name
from cuplama.lab.check import check, poison, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload
from cuplama.ops.abstract import attributes
from cuplama.ops.attention import attention
from cuplama.ops.attention_cases import attention_case
from cuplama.ops.binding import bind_plan
from cuplama.ops.fused import append_attention
from cuplama.ops.launch import Device
from cuplama.ops.op import Op
from cuplama.simt.emulator import run

from . import harness

Inputs = dict[str, Any]

HOPPER, AMPERE, TURING = Device(90), Device(80), Device(75, 40, 65536)  # their prefill kernels differ


def _workload(op: Op, ins: Inputs, case: harness.Case) -> Workload:
    T = ins["x"].dtype
    arrays = tuple(ins[s.name] for s in op.signature.ins)
    return Workload(op, arrays, attributes(op, case, T), dtype_name(T))


def _run_on(executor: EmulatedDevice, ins: Inputs, case: harness.Case) -> np.ndarray[Any, Any]:
    workload = _workload(attention, ins, case)
    (y,) = run_guarded(workload, workload.arrays(), executor)
    return y


def _run(ins: Inputs, case: harness.Case, seed: int = 0, device: Device = HOPPER) -> np.ndarray[Any, Any]:
    return _run_on(EmulatedDevice(device, seed=seed), ins, case)


def _inputs(case: harness.Case, T: str) -> Inputs:
    return attention.random_inputs(np.random.default_rng(3), case, DTYPES[T])


def _alone(ins: Inputs, i: int, width: int) -> Inputs:
    """Sequence i as a batch of one, its table cut or widened to `width` pages."""
    first, last = ins["cu_seqlens"][i : i + 2]
    blocks = np.full((1, width), 2**30, np.int32)
    keep = min(width, ins["page_table"].shape[1])
    blocks[0, :keep] = ins["page_table"][i, :keep]
    return {
        **ins,
        "x": ins["x"][first:last].copy(),
        "cu_seqlens": np.array([0, last - first], np.int32),
        "seq_lens": ins["seq_lens"][i : i + 1].copy(),
        "page_table": blocks,
    }


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(("T", "C"), [("f32", "T"), ("bf16", "T"), ("bf16", "e4m3")])
def test_decode_does_not_depend_on_the_batch_or_the_table(T: str, C: str, window: int) -> None:
    case = attention_case(6, 2, 16, [1, 1, 1], [5, 700, 4200], window=window, S=64, C=C)
    ins = _inputs(case, T)
    together = _run(ins, case)
    for i in range(3):
        for width in (-(-int(ins["seq_lens"][i]) // 64), 200):
            assert np.array_equal(_run(_alone(ins, i, width), case)[0], together[i])


@pytest.mark.parametrize("C", ["T", "e4m3"])
def test_decode_of_wide_heads_does_not_depend_on_the_batch_or_the_table(C: str) -> None:
    """One split, as many as there can be of these lengths, and a table that would allow more."""
    case = attention_case(4, 2, 256, [1, 1, 1], [5, 150, 420], S=64, C=C)
    ins = _inputs(case, "bf16")
    together = _run(ins, case)
    for i in range(3):
        for width in (-(-int(ins["seq_lens"][i]) // 64), 40):
            assert np.array_equal(_run(_alone(ins, i, width), case)[0], together[i])


@pytest.mark.parametrize("device", [AMPERE, Device(120, 170, 101376)], ids=["sm_80", "sm_120"])
def test_wide_heads_on_other_gpus(device: Device) -> None:
    """Less shared memory means fewer warps; an e4m3 cache is widened by other instructions before sm_89."""
    for D, C in ((256, "T"), (512, "e4m3")):
        case = attention_case(4, 2, D, [1, 1], [250, 17], S=64, C=C)
        ins = _inputs(case, "bf16")
        workload = _workload(attention, ins, case)
        check(workload, workload.arrays(), [_run(ins, case, device=device)])


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize(
    ("T", "C", "D", "device"),
    [
        ("f32", "T", 32, HOPPER),
        ("bf16", "T", 64, HOPPER),
        ("bf16", "T", 64, AMPERE),
        ("f32", "e4m3", 32, HOPPER),
        ("bf16", "e4m3", 64, HOPPER),
    ],
)
def test_prefill_does_not_depend_on_the_batch_or_the_chunks(
    T: str, C: str, D: int, device: Device, window: int
) -> None:
    case = attention_case(4, 2, D, [50, 1, 90], [70, 33, 150], window=window, C=C)
    ins = _inputs(case, T)
    together = _run(ins, case, device=device)
    cu_seqlens = ins["cu_seqlens"]
    for i in (0, 2):
        alone = _alone(ins, i, 10)
        assert np.array_equal(_run(alone, case, device=device), together[cu_seqlens[i] : cu_seqlens[i + 1]])
        for cut in (2, 41):  # the first `cut` tokens alone: what follows a token does not change its result
            length = int(alone["seq_lens"][0]) - len(alone["x"]) + cut
            part = {
                **alone,
                "x": alone["x"][:cut].copy(),
                "cu_seqlens": np.array([0, cut], np.int32),
                "seq_lens": np.array([length], np.int32),
            }
            assert np.array_equal(_run(part, case, device=device), together[cu_seqlens[i] : cu_seqlens[i] + cut])


@pytest.mark.parametrize("T", ["f16", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        attention_case(4, 1, 128, [33, 31], [64, 129], S=64),
        attention_case(7, 1, 64, [19, 1, 2], [65, 130, 64], S=128),
        attention_case(1, 1, 96, [127, 3], [128, 67], window=63, S=16),
        attention_case(3, 1, 8, [60], [130], window=30, S=8),
        attention_case(2, 1, 80, [65], [97]),
    ],
    ids=lambda case: f"D={case['D']}",
)
def test_prefill_tiles_of_64_and_of_128_rows(case: harness.Case, T: str) -> None:
    """Short prompts take the one, long ones the other; a result must not depend on it. The reference judges both."""
    ins = _inputs(case, T)
    small, large = (_run(ins, case, device=Device(arch=80, sms=sms)) for sms in (132, 0))
    assert np.array_equal(small, large)
    workload = _workload(attention, ins, case)
    check(workload, workload.arrays(), [large])


def test_soft_limits_and_sinks_by_their_formula() -> None:
    """Of the last token: softcap * tanh(s / softcap), and a softmax with one more logit, whose weight is dropped."""
    case = attention_case(6, 2, 8, [3], [20], S=8, softcap=0.7, sinks=True)
    ins = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in _inputs(case, "f32").items()}
    workload = _workload(attention, ins, case)
    y = attention.reference(*workload.ins, **workload.attrs)[-1].reshape(6, 8)
    pages = ins["page_table"][0, :3]
    keys, values = (ins[name][pages].transpose(1, 0, 2, 3).reshape(2, 24, 8)[:, :20] for name in ("k", "v"))
    for head, q in enumerate(ins["x"][-1].reshape(10, 8)[:6]):
        scores = 0.7 * np.tanh(keys[head // 3] @ q * case["scale"] / 0.7)
        weights = np.exp(np.append(scores, ins["sinks"][head]))
        np.testing.assert_allclose(y[head], (weights / weights.sum())[:-1] @ values[head // 3], rtol=1e-12)


@pytest.mark.parametrize(("T", "device"), [("bf16", AMPERE), ("f16", TURING)], ids=["sm_80", "sm_75"])
def test_soft_limits_and_sinks_on_older_gpus(T: str, device: Device) -> None:
    for new in (1, 40):
        case = attention_case(4, 2, 64, [new], [140], window=90, S=64, softcap=1.5, sinks=True)
        ins = _inputs(case, T)
        workload = _workload(attention, ins, case)
        check(workload, workload.arrays(), [_run(ins, case, device=device)])


@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_prompts_with_the_largest_heads(T: str) -> None:
    case = attention_case(2, 1, 512, [20, 1], [70, 33], window=40, S=64)
    ins = _inputs(case, T)
    workload = _workload(attention, ins, case)
    check(workload, workload.arrays(), [_run(ins, case)])


BLIND = [("f32", 32, 90), ("bf16", 64, 90), ("bf16", 128, 90), ("bf16", 64, 80), ("f16", 40, 75), ("bf16", 288, 90)]


def check_rows_without_keys(executor: EmulatedDevice, T: str, D: int, window: int) -> None:
    """An empty sequence of a padded decode step gives zeros and reads nothing; the others are as without it."""
    case = attention_case(6, 2, D, [1, 1, 1], [40, 20, 150], window=window)
    ins = _inputs(case, T)
    together = _run_on(executor, ins, case)
    ins["seq_lens"][1] = 0
    ins["page_table"][1] = 2**30
    padded = _run_on(executor, ins, case)
    assert np.array_equal(padded[[0, 2]], together[[0, 2]])
    assert (padded[1] == 0).all()


def test_empty_sequences_of_a_padded_batch() -> None:
    check_rows_without_keys(EmulatedDevice(HOPPER), "f32", 32, 0)


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize(("T", "D", "arch"), BLIND)
def test_empty_sequences_of_a_padded_batch_on_a_deterministic_device(T: str, D: int, arch: int, window: int) -> None:
    """There a decode step takes the kernels of prompts: none of them waits for keys of no token."""
    check_rows_without_keys(EmulatedDevice(Device(arch, deterministic=True)), T, D, window)


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("sms", [132, 0])
@pytest.mark.parametrize(
    ("T", "C", "D", "arch"),
    [
        ("f32", "T", 32, 90),
        ("bf16", "T", 64, 90),
        ("bf16", "T", 128, 90),
        ("bf16", "T", 64, 80),
        ("f16", "T", 40, 75),
        ("bf16", "e4m3", 128, 90),
    ],
)
def test_rows_and_sequences_that_fill_up_a_batch(T: str, C: str, D: int, arch: int, sms: int, window: int) -> None:
    """Rows behind the last sequence are neither read nor written, and empty sequences read nothing."""
    case = attention_case(4, 2, D, [50, 1, 20], [70, 33, 150], window=window, C=C)
    ins = _inputs(case, T)
    device = Device(arch, sms)
    together = _run(ins, case, device=device)
    rows, b, M = len(ins["x"]), len(ins["seq_lens"]), ins["page_table"].shape[1]
    padded = {
        **ins,
        "x": np.concatenate([ins["x"], np.full((77, ins["x"].shape[1]), np.nan, ins["x"].dtype)]),
        "cu_seqlens": np.concatenate([ins["cu_seqlens"], np.full(5, rows, np.int32)]),
        "seq_lens": np.concatenate([ins["seq_lens"], np.zeros(5, np.int32)]),
        "page_table": np.concatenate([ins["page_table"], np.full((5, M), 2**30, np.int32)]),
    }
    assert len(padded["cu_seqlens"]) == b + 6
    y = _run(padded, case, device=device)
    assert np.array_equal(y[:rows], together)
    assert np.isnan(y[rows:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_thread_order_does_not_matter(seed: int) -> None:
    decode = (40, [1, 1], [130, 90]), (256, [1], [130])
    for D, new, seq_lens in (*decode, (40, [33, 2], [40, 60]), (64, [33, 2], [40, 400])):
        for C in ("T", "e4m3"):
            case = attention_case(5, 1, D, new, seq_lens, C=C)
            ins = _inputs(case, "f16")
            assert np.array_equal(_run(ins, case, seed), _run(ins, case))


def _append_case(seq_lens: list[int], window: int = 0, C: str = "T") -> harness.Case:
    case = attention_case(6, 2, 32, [1] * len(seq_lens), seq_lens, window=window, S=64, C=C)
    return {**case, "h": 12, "R": 9, "eps": 1e-6}


def _run_append(ins: Inputs, case: harness.Case, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """y, k and v. Two launches over the same counters, as a captured step makes them; the second repeats the first."""
    outs = []
    counters: dict[str, Array] = {}

    def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.full(shape, poison(dtype), dtype)

    def zeros(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return counters.setdefault(name, np.zeros(shape, dtype))

    assert append_attention.kernels is not None
    for _ in range(2):
        call = _workload(append_attention, {**ins, "k": ins["k"].copy(), "v": ins["v"].copy()}, case).bind()
        for launch in bind_plan(append_attention.kernels(call, Device()), call, empty, zeros):
            run(launch, seed=seed)
        outs.append([np.asarray(call.arrays[name]) for name in ("y", "k", "v")])
    assert all(_same(a, b) for a, b in zip(*outs, strict=True))
    return outs[0]


def _same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Bit for bit: NaN, of unused places, is equal to itself."""
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(("T", "C"), [("f32", "T"), ("bf16", "T"), ("bf16", "e4m3")])
def test_append_does_not_depend_on_the_batch_or_the_table(T: str, C: str, window: int) -> None:
    case = _append_case([5, 700, 2900], window, C)
    ins: Inputs = append_attention.random_inputs(np.random.default_rng(4), case, DTYPES[T])
    y, k, v = _run_append(ins, case)
    for i in range(3):
        alone: Inputs = {
            **_alone(ins, i, 90),
            "slot_mapping": ins["slot_mapping"][i : i + 1],
            "rope_rows": ins["rope_rows"][i : i + 1],
        }
        y1, k1, v1 = _run_append(alone, case)
        assert np.array_equal(y1[0], y[i])
        page, place = divmod(int(ins["slot_mapping"][i]), case["S"])
        assert np.array_equal(k1[page, :, place], k[page, :, place])
        assert np.array_equal(v1[page, :, place], v[page, :, place])


def test_append_does_not_read_the_slot() -> None:
    """What lies where the new token goes is not looked at, not even to be multiplied by zero."""
    case = _append_case([70, 129, 64])
    for T in ("f32", "f16"):
        ins: Inputs = append_attention.random_inputs(np.random.default_rng(5), case, DTYPES[T])
        y, *_ = _run_append(ins, case)
        new = ins["slot_mapping"] // case["S"], slice(None), ins["slot_mapping"] % case["S"]
        for cache in (ins["k"], ins["v"]):
            cache[new] = np.nan
        again, k, v = _run_append(ins, case)
        assert np.array_equal(again, y)
        assert not np.isnan(k[new]).any()
        assert not np.isnan(v[new]).any()


@pytest.mark.parametrize("seed", range(1, 4))
def test_append_does_not_depend_on_the_order_of_threads(seed: int) -> None:
    for T, C in (("f32", "T"), ("f16", "T"), ("f16", "e4m3")):
        case = _append_case([300, 90], C=C)
        ins = append_attention.random_inputs(np.random.default_rng(6), case, DTYPES[T])
        for a, b in zip(_run_append(ins, case, seed), _run_append(ins, case), strict=True):
            assert _same(a, b)
