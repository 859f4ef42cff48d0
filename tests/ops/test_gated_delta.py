"""What the cases of the ops of gated delta layers leave out: hard gates and keys, and how a prompt is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, Array, narrow
from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.causal_conv import stateful_case
from cuplama.ops.launch import Device
from cuplama.ops.op import Op
from cuplama.ops.signature import OpError

SIZES: dict[str, dict[str, Any]] = {
    "causal_conv": dict(d=40, m=48, K=4, bias=True),
    "gated_delta": dict(G=1, H=2, K=64, V=64, m=4),
}
DETERMINISTIC = Device(deterministic=True)


def _hard(kind: str, x: Array, ba: Array, dt_bias: Array, K: int) -> None:
    """Changes the inputs of one key head: of keys that say the same, what was written is what is corrected."""
    H, key = ba.shape[1] // 2, x[:, K : 2 * K]
    if kind == "forgetful":
        ba[:, H:] = np.where(np.arange(len(ba))[:, None] % 9 == 5, 60, -10)
        return
    signs = 1 - 2 * (np.arange(len(x)) % 2) if kind == "alternating" else np.ones(len(x))
    key[:] = signs[:, None] * key[0] + (0.05 * key if kind == "similar" else 0)
    ba[:, :H], dt_bias[:] = 8, -12


@pytest.mark.parametrize("kind", ["equal", "similar", "alternating", "forgetful"])
@pytest.mark.parametrize("T", ["f16", "bf16"])
def test_hard_prompts(kind: str, T: str) -> None:
    op, sizes = OPS["gated_delta"], SIZES["gated_delta"]
    workload = case_workload(op, stateful_case([100], [150], **sizes), T)
    arrays = dict(zip((s.name for s in op.signature.ins), workload.arrays(), strict=True))
    x, ba, dt_bias = (np.asarray(arrays[name]).astype(np.float32) for name in ("x", "ba", "dt_bias"))
    _hard(kind, x, ba, dt_bias, sizes["K"])
    changed = {"x": narrow(x, DTYPES[T]), "ba": narrow(ba, DTYPES[T]), "dt_bias": dt_bias}
    hard = replace(workload, ins=tuple((arrays | changed).values()))
    (launch,) = op.kernels(hard.bind(), Device()).launches if op.kernels else ()
    assert launch.kernel == "gated_delta_chunks.cu:gated_delta_chunks"
    check(hard, hard.arrays(), run_guarded(hard, hard.arrays(), EmulatedDevice()))


def _in_parts(op: Op, T: str, cuts: tuple[int, ...]) -> tuple[Array, Array]:
    """Output and state of a sequence on a deterministic device, its tokens in parts that end at ``cuts``."""
    n = cuts[-1]
    workload = case_workload(op, stateful_case([n], [n + 3], **SIZES[op.name]), T)
    arrays = dict(zip((s.name for s in op.signature.ins), workload.arrays(), strict=True))
    stored = op.signature.outs[1].name
    rows, found = [s.name for s in op.signature.ins if s.dims and s.dims[0] == "n"], []
    for first, last in zip((0, *cuts), cuts, strict=False):
        part: dict[str, Any] = arrays | {name: np.asarray(arrays[name])[first:last] for name in rows}
        part |= {"cu_seqlens": np.array([0, last - first], np.int32), "seq_lens": np.array([last + 3], np.int32)}
        few = Workload(op, tuple(part.values()), workload.attrs, T)
        y, arrays[stored] = run_guarded(few, list(part.values()), EmulatedDevice(DETERMINISTIC))
        found.append(y)
    return np.concatenate(found), np.asarray(arrays[stored])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_a_deterministic_device_gives_the_same_however_a_prompt_is_cut(name: str, T: str) -> None:
    whole, state = _in_parts(OPS[name], T, (21,))
    for cuts in ((20, 21), (1, 2, 11, 21)):
        parts, after = _in_parts(OPS[name], T, cuts)
        assert np.array_equal(parts.view(np.uint8), whole.view(np.uint8))
        assert np.array_equal(after.view(np.uint8), state.view(np.uint8))


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("causal_conv", dict(K=10), "causal_conv: K is 10; the kernel takes 2 to 9"),
        ("gated_delta", dict(K=12), "gated_delta: K is 12; the kernel takes multiples of 8 up to 256"),
        ("gated_delta", dict(V=264), "gated_delta: V is 264; the kernel takes multiples of 8 up to 256"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(name: str, sizes: dict[str, int], message: str) -> None:
    op = OPS[name]
    call = case_workload(op, stateful_case([3], [3], **SIZES[name] | sizes), "f16").bind()
    assert op.kernels is not None
    with pytest.raises(OpError, match=message):
        op.kernels(call, Device())
