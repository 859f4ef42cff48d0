"""GPUs with few multiprocessors: there a warp of linear.cu has several units and rows of w left over in the last, a
block of linear_mma.cu several groups of tiles, one of experts_mma.cu several experts, and one of attention_decode.cu
several splits, with small arrays. On a large GPU it takes large ones."""

from __future__ import annotations

import pytest

from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.ops import OPS
from cuplama.ops.attention_cases import attention_case
from cuplama.ops.launch import Device
from cuplama.ops.self_attention import self_attention_case

from . import harness

_DECODE = attention_case(6, 2, 64, [1] * 12, [600, 5, 290, 17, 16, 1, 33, 560, 2, 32, 64, 3])
_WIDE = {"eps": 1e-5, "b": True}
_EXPERTS = dict(n=9, s=2, E=7, m=40, k=136, b=True, chosen=5)
CASES: tuple[tuple[str, harness.Case, Device], ...] = (
    ("linear", dict(n=2, m=127, k=72, b=True, U="T"), Device(sms=2)),  # units of 4 rows, the last of 3
    ("linear", dict(n=3, m=250, k=512, b=False, U="f32"), Device(sms=2)),  # two units for a warp
    ("linear", dict(n=1, m=250, k=1032, b=True, U="T"), Device(sms=2)),  # more batches than the ring is deep
    ("linear", dict(n=2, m=63, k=71, b=True, U="f32"), Device(sms=2)),  # units of 2 rows; no 16-byte accesses
    ("linear_add", dict(n=3, m=123, k=512, b=True), Device(sms=2)),
    ("rms_norm_linear_silu_mul", dict(n=3, m=125, k=264, **_WIDE), Device(sms=2)),
    ("layer_norm_linear", dict(n=2, m=31, k=21, U="T", **_WIDE), Device(sms=2)),
    # linear_mma.cu (in bf16): several groups of tiles, the last of half a tile; slices of k that end early
    ("linear", dict(n=8, m=101, k=1160, b=True, U="f32"), Device(sms=2)),
    ("linear_add", dict(n=5, m=37, k=4168, b=False), Device(sms=1)),
    ("rms_norm_linear_silu_mul", dict(n=7, m=45, k=1096, **_WIDE), Device(sms=1)),
    ("layer_norm_linear_gelu_erf", dict(n=4, m=43, k=200, **_WIDE), Device(sms=1)),
    ("rms_norm_linear", dict(n=3, m=33, k=328, U="f32", **_WIDE), Device(sms=2)),
    # ... and k in two phases: more than 128 chunks of 64, or 64 with a norm
    ("linear_add", dict(n=6, m=45, k=8264, b=True), Device(sms=1)),
    ("rms_norm_linear_silu_mul", dict(n=2, m=35, k=4168, **_WIDE), Device(sms=1)),
    ("layer_norm_linear", dict(n=3, m=19, k=4104, U="f32", **_WIDE), Device(sms=1)),
    ("rms_norm_add_norm_linear_silu_mul", dict(n=7, m=45, k=1096, scalar=True, offset=1, **_WIDE), Device(sms=1)),
    ("rms_norm_add_linear", dict(n=3, m=33, k=328, U="f32", scalar=True, **_WIDE), Device(sms=2)),
    # ... which linear.cu computes on GPUs without tensor cores for it; x, several pieces for a thread, ends the memory
    ("linear", dict(n=4, m=61, k=520, b=True, U="T"), Device(arch=75, sms=2, shared=65536)),
    # ... whose rows do not all fit in shared memory
    ("rms_norm_add_norm_linear", dict(n=5, m=31, k=1040, U="T", scalar=False, offset=1, **_WIDE),
     Device(arch=75, sms=2, shared=65536)),
    # Adapters in 16 bits without tensor cores
    ("lora_add", dict(n=67, m=70, q=34, r=17, scale=0.5, U="T"), Device(arch=75, sms=40, shared=65536)),
    ("lora_backward_h", dict(n=9, m=1100, q=17, r=17, scale=0.5), Device(arch=75, sms=40, shared=65536)),
    ("lora_backward_b", dict(n=1100, m=70, q=34, r=17, scale=0.5), Device(arch=75, sms=40, shared=65536)),
    # experts_mma.cu: a block goes from expert to expert; k in two phases, with more columns than wait at a time
    ("expert_linear", _EXPERTS, Device(sms=3)),
    ("expert_linear_clamped_swiglu", {**_EXPERTS, "alpha": 1.702, "limit": 7.0}, Device(sms=1)),
    ("expert_linear", dict(n=2, s=2, E=3, m=150, k=6200, b=True), Device(sms=1)),
    # experts_combine_mma.cu: more elements of y in a block than it has threads; small tiles of several blocks
    ("expert_linear_combine", dict(n=5, s=2, E=6, m=150, k=200, b=True, a=True), Device(sms=1)),
    ("expert_linear_combine", dict(n=1, s=3, E=6, m=50, k=456, b=True, a=True), Device(80, 3, 166912)),
    # experts_many_mma.cu, before Hopper: tiles of 64 pairs and of 128, several of the weights' rows, odd columns
    ("expert_linear", dict(n=90, s=1, E=2, m=137, k=136, b=True), Device(80, 108, 166912)),
    ("expert_linear_silu_mul", dict(n=200, s=2, E=2, m=42, k=392, b=True), Device(80, 108, 166912)),
    # ... of packed weights, with rings that are gone through more than once
    ("expert_linear", dict(n=70, s=1, E=2, m=137, k=552, b=True, W="int8"), Device(80, 108, 166912)),
    ("expert_linear_silu_mul", dict(n=100, s=2, E=3, m=80, k=424, b=True, W="mxfp4", chosen=2),
     Device(80, 108, 166912)),
    ("attention", _DECODE, Device(sms=8)),
    # GPUs before Hopper, at head sizes that have kernels of their own there
    ("self_attention", self_attention_case(3, 1, 64, [70, 9], window=33), Device(80, 108, 166912)),
    ("self_attention_backward", self_attention_case(3, 1, 64, [70, 9], window=33), Device(80, 108, 166912)),
    ("self_attention_backward", self_attention_case(2, 1, 128, [67]), Device(80, 108, 166912)),
    ("append_attention", {**_DECODE, **dict.fromkeys(("rope_rows", "cos", "sin", "q_norm", "k_norm"), True),
                          "h": 24, "R": 9, "eps": 1e-6}, Device(sms=8)),
)  # fmt: skip


@pytest.mark.parametrize("T", ["f32", "bf16"])
@pytest.mark.parametrize(("name", "case", "device"), CASES, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(CASES)])
def test_small_gpu(name: str, case: harness.Case, device: Device, T: str) -> None:
    workload = harness.workload(OPS[name], case, T)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice(device)))
