"""Norms behind sublayers that the next product computes: where it does, and how its rows fit into a block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import case_workload, described_workload
from cuplama.ops import OPS, added_norm
from cuplama.ops.launch import Device

HOPPER, TURING, LATER = Device(), Device(75, 40, 65536), Device(120, 170, 101376)
NORMED, PLAIN, GATED = (f"rms_norm_add_{rest}" for rest in ("norm_linear", "linear", "norm_linear_gelu_tanh_mul"))
_CASE: dict[str, Any] = {"m": 40, "b": True, "eps": 1e-5, "offset": 1, "scalar": True, "U": "T"}


def _launches(op: str, device: Device, **case: Any) -> list[str]:
    call = described_workload(OPS[op], {**_CASE, **case}, "f16").bind()
    kernels = OPS[op].kernels
    assert kernels is not None
    return [launch.kernel.partition(":")[2] for launch in kernels(call, device).launches]


@pytest.mark.parametrize(
    ("op", "device", "case", "launches"),
    [
        (NORMED, HOPPER, dict(n=1, k=2560), ["rms_norm_add_linear"]),
        (NORMED, HOPPER, dict(n=1, k=2560, U="f32"), ["rms_norm_add_linear"]),
        (GATED, HOPPER, dict(n=6, k=2560), ["rms_norm_add_linear_mma"]),
        (GATED, HOPPER, dict(n=8, k=2560), ["rms_norm_add", "rms_norm_linear_mma"]),
        (NORMED, HOPPER, dict(n=2, k=2560), ["rms_norm_add_linear_mma"]),
        # Two 16-bit numbers for an element, or more than 64 chunks: registers do not hold the rows.
        (NORMED, HOPPER, dict(n=3, k=2560, U="f32"), ["rms_norm_add", "rms_norm_linear_mma"]),
        (NORMED, HOPPER, dict(n=2, k=5376), ["rms_norm_add", "rms_norm_linear_mma"]),
        (PLAIN, HOPPER, dict(n=1, k=5376), ["rms_norm_add_linear"]),
        (PLAIN, HOPPER, dict(n=8, k=5120), ["rms_norm_add", "cast", "linear_mma"]),
        (NORMED, HOPPER, dict(n=1, k=2560, W="int4 g128"), ["rms_norm_add", "rms_norm_linear_packed"]),
        (PLAIN, HOPPER, dict(n=1, k=2560, W="int4 g128"), ["rms_norm_add", "cast", "linear_packed"]),
        (NORMED, HOPPER, dict(n=9, k=64), ["rms_norm_add", "rms_norm_linear_mma", "rms_norm_linear"]),
        # Shared memory of 64 KB holds a row of 2,560 beside the ring, and none of 5,376.
        (NORMED, TURING, dict(n=1, k=2560), ["rms_norm_add_linear"]),
        (NORMED, TURING, dict(n=1, k=5376), ["rms_norm_add", "rms_norm_linear"]),
        (NORMED, Device(deterministic=True), dict(n=1, k=64), ["rms_norm_add", "rms_norm_linear"]),
    ],
)
def test_the_product_computes_the_norm_where_its_blocks_read_little_for_it(
    op: str, device: Device, case: dict[str, Any], launches: list[str]
) -> None:
    assert _launches(op, device, **case) == launches


@pytest.mark.parametrize("n", [1, 2])
def test_no_bytes_leave_every_norm_to_a_launch(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(added_norm, "MAX_ADDED_BYTES", 0)
    assert _launches(NORMED, HOPPER, n=n, k=64)[0] == "rms_norm_add"


@pytest.mark.parametrize(
    ("op", "T", "device", "case"),
    [
        (NORMED, "bf16", Device(sms=1), dict(n=2, k=4168)),  # k in two phases
        (NORMED, "bf16", Device(sms=1), dict(n=7, k=4104, U="f32")),
        (PLAIN, "f16", Device(sms=2), dict(n=5, k=4168)),
        (GATED, "bf16", Device(120, 2, 101376), dict(n=3, k=3592)),  # eight chunks for a warp, which reads x again
        (PLAIN, "bf16", Device(120, 2, 101376), dict(n=2, k=2568)),  # six, in two groups
        (NORMED, "bf16", Device(sms=2), dict(n=2, k=3592)),  # four
        (GATED, "f32", TURING, dict(n=8, k=1040)),  # rows in groups of fewer than 8
        (PLAIN, "f16", TURING, dict(n=8, k=1032, U="f32")),
        (NORMED, "f32", Device(sms=2), dict(n=3, k=1100)),  # vectors of x, but none of 8 weights
    ],
)
def test_rows_that_are_read_again_or_in_groups(
    monkeypatch: pytest.MonkeyPatch, op: str, T: str, device: Device, case: dict[str, Any]
) -> None:
    monkeypatch.setattr(added_norm, "MAX_ADDED_BYTES", 1 << 30)
    workload = case_workload(OPS[op], {**_CASE, **case}, T)
    arrays = workload.arrays()
    kernels = OPS[op].kernels
    assert kernels is not None
    launches = kernels(workload.bind(), device).launches
    assert {launch.kernel.partition(":")[2].removesuffix("_mma") for launch in launches} == {"rms_norm_add_linear"}
    assert (len(launches) > 1) == (device is TURING)
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice(device)))


@pytest.mark.parametrize("T", ["f32", "bf16"])
@pytest.mark.parametrize("op", [NORMED, PLAIN])
def test_a_row_does_not_depend_on_the_others(op: str, T: str) -> None:
    """Bit for bit, from two rows on, neither of the product nor of the residual stream."""
    workload = case_workload(OPS[op], {**_CASE, "n": 8, "k": 1096}, T)
    arrays = workload.arrays()
    together = run_guarded(workload, arrays, EmulatedDevice())
    specs = OPS[op].signature.ins
    for rows in (slice(0, 2), slice(3, 8)):
        few = [x[rows] if s.name in ("x", "a") else x for s, x in zip(specs, arrays, strict=True)]  # type: ignore[index]
        alone = run_guarded(type(workload)(workload.op, tuple(few), workload.attrs, T), few, EmulatedDevice())
        for part, whole in zip(alone, together, strict=True):
            assert np.array_equal(part.view(np.uint8), whole[rows].view(np.uint8))
