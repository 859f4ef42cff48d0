"""How the gradients of norms share rows among blocks, and what must not depend on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.lab.check import run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device, Plan
from cuplama.simt.emulator import run

_ROWS = ("rms_norm_backward", "layer_norm_backward")


def _plan(workload: Workload) -> Plan:
    kernels = workload.op.kernels
    assert kernels is not None
    return kernels(workload.bind(), Device())


@pytest.mark.parametrize("name", _ROWS)
@pytest.mark.parametrize(("n", "d"), [(1, 8), (2, 8), (3, 100), (513, 64), (2000, 768), (1000, 2048), (500, 5000)])
def test_every_block_has_rows_and_about_as_many_as_the_others(name: str, n: int, d: int) -> None:
    plan = _plan(case_workload(OPS[name], dict(n=n, d=d, eps=1e-5, a=False), "f32"))
    (blocks,) = plan.launches[0].grid
    most, least = -(-n // blocks), n // blocks
    assert 1 <= least <= most <= least + 1
    assert most >= 2 or n == 1
    assert plan.launches[1].constants["blocks"] == blocks == plan.scratch["partial"][0][1]


@pytest.mark.parametrize("name", _ROWS)
def test_sums_of_blocks_are_little_beside_the_rows(name: str) -> None:
    """Of a pass over 16 documents of 1,024 tokens in GPT-2's size."""
    op = OPS[name]
    workload = case_workload(op, dict(n=16, d=768, eps=1e-5, a=True), "bf16")
    call = workload.bind()
    call.env["n"] = 16384
    assert op.kernels is not None
    shape, _ = op.kernels(call, Device()).scratch["partial"]
    assert 2 * 4 * np.prod(shape) < 0.1 * call.nbytes()  # written once and read once


@pytest.mark.parametrize("name", _ROWS)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    """Bit for bit: which block a row goes to, and what is behind it there, changes nothing."""
    op, case = OPS[name], dict(n=7, d=300, eps=1e-5, a=True)
    workload = case_workload(op, case, "bf16")
    arrays = workload.arrays()
    together = run_guarded(workload, arrays, EmulatedDevice())[0]
    for rows in (slice(0, 1), slice(2, 7)):
        few = [x[rows] if s.name in ("x", "dy", "a") and x is not None else x
               for s, x in zip(op.signature.ins, arrays, strict=True)]  # fmt: skip
        alone = run_guarded(Workload(op, tuple(few), workload.attrs, "bf16"), few, EmulatedDevice())[0]
        assert np.array_equal(alone.view(np.uint32), together[rows].view(np.uint32))


class _Shuffled(EmulatedDevice):
    """The threads of a block start in another order."""

    def launch(self, bound: Any) -> None:
        run(bound, seed=3, arch=self.device.arch)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, dict(n=9, d=600, eps=1e-5, a=False)) for name in _ROWS),
        ("qk_norm_backward", dict(n=9, num_heads=3, num_kv_heads=2, D=72, eps=1e-6)),
    ],
)
def test_sums_over_rows_have_one_order(name: str, case: dict[str, Any]) -> None:
    workload = case_workload(OPS[name], case, "f32")
    arrays = workload.arrays()
    first, second = (run_guarded(workload, arrays, device) for device in (EmulatedDevice(), _Shuffled()))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))
