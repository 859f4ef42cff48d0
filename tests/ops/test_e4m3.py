"""An e4m3 cache on the emulator, by the instructions of sm_89 and by the shifts of older GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, Array, narrow
from cuplama.lab.check import check, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.abstract import attributes
from cuplama.ops.attention import attention
from cuplama.ops.attention_cases import attention_case
from cuplama.ops.binding import bind_plan
from cuplama.ops.launch import Device
from cuplama.simt.emulator import run

E4M3 = DTYPES["e4m3"]
DEVICES = [Device(90), Device(80)]
_IDS = ["sm_90", "sm_80"]


def _floats() -> np.ndarray[Any, Any]:
    """All numbers of e4m3, what lies in the middle of two and beside it, and what is too large, too small or none."""
    numbers = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    middle = (numbers[:-1] + numbers[1:]) / 2
    near = [np.nextafter(middle, np.float32(to)) for to in (0, 1e3)]
    rest = [463.9, 464, 480, 1e9, np.inf, np.nan, 2.0**-11, 1e-30, 1e-40]
    positive = np.concatenate([numbers, middle, *near, rest]).astype(np.float32)
    return np.resize(np.concatenate([positive, -positive]), 1024)


@pytest.mark.parametrize("device", DEVICES, ids=_IDS)
def test_every_number_is_rounded_as_numpy_does(device: Device) -> None:
    """Bit for bit, but for a NaN's sign."""
    x = _floats().reshape(4, 256)
    case = dict(n=4, w=256, H=2, D=64, P=1, S=8, C="e4m3")
    cache = np.zeros((1, 2, 8, 64), E4M3)
    ins = (x, np.arange(4, dtype=np.int32), cache, cache.copy())
    workload = Workload(OPS["kv_append"], ins, attributes(OPS["kv_append"], case, DTYPES["f32"]), "f32")
    k, v = run_guarded(workload, list(ins), EmulatedDevice(device))
    found = np.stack([k[0, :, :4], v[0, :, :4]]).transpose(2, 0, 1, 3).reshape(4, 256)
    wanted = narrow(x, E4M3)
    nan = np.isnan(wanted.astype(np.float32))
    assert np.array_equal(np.isnan(found.astype(np.float32)), nan)
    assert np.array_equal(found.view(np.uint8)[~nan], wanted.view(np.uint8)[~nan])


@pytest.mark.parametrize("T", ["f16", "bf16"])
@pytest.mark.parametrize("device", DEVICES, ids=_IDS)
def test_every_number_is_widened_exactly(device: Device, T: str) -> None:
    """All 256, on pages for a prompt; of the other pages nothing is written."""
    case = attention_case(2, 1, 64, [8], [40], S=64, C="e4m3")
    ins: dict[str, Any] = attention.random_inputs(np.random.default_rng(0), case, DTYPES[T])
    for cache in (ins["k"], ins["v"]):
        cache.view(np.uint8)[...] = np.resize(np.arange(256, dtype=np.uint8), cache.shape)
    workload = Workload(attention, tuple(ins.values()), attributes(attention, case, DTYPES[T]), T)
    call, made = workload.bind([ins[s.name] for s in attention.signature.ins]), dict[str, Array]()

    def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return made.setdefault(name, np.full(shape, -7, dtype))

    assert attention.kernels is not None
    launch, *_ = bind_plan(attention.kernels(call, device), call, empty, empty)
    assert launch.expression == f"widen_pages<{T}, e4m3, 64, 64>"
    run(launch, arch=device.arch)
    used = ins["page_table"][0, 0]
    for name in ("k", "v"):
        found, wanted = made[f"wide_{name}"].astype(np.float32), ins[name].astype(np.float32)
        assert (np.delete(found, used, 0) == -7).all()
        nan = np.isnan(wanted[used])
        assert np.array_equal(found[used][~nan], wanted[used][~nan])
        if device.arch >= 89:
            assert np.isnan(found[used][nan]).all()
        else:  # shifted bits know no NaN
            assert (np.abs(found[used][nan]) == 480).all()


_CASES = [
    attention_case(32, 8, 128, [1], [300], S=64, C="e4m3"),
    attention_case(7, 1, 64, [1, 1], [513, 64], S=64, C="e4m3"),
    attention_case(6, 2, 80, [1, 1], [100, 33], 20, C="e4m3"),
    attention_case(4, 2, 64, [33, 1, 7], [33, 40, 12], C="e4m3"),
]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"n={case['n']},D={case['D']}")
@pytest.mark.parametrize(("T", "arch"), [("bf16", 80), ("f16", 80), ("f16", 75), ("f32", 75)])
def test_attention_of_older_gpus(case: dict[str, Any], T: str, arch: int) -> None:
    workload = case_workload(attention, case, T)
    arrays = workload.arrays()
    device = EmulatedDevice(Device(arch, shared=65536 if arch == 75 else 166912))
    check(workload, arrays, run_guarded(workload, arrays, device))


@pytest.mark.parametrize("size", [1e5, 1e-3])
@pytest.mark.parametrize("name", ["attention", "append_attention"])
def test_queries_beyond_what_f16_holds(name: str, size: float) -> None:
    """A bf16 model's products are computed in f16 with such a cache: its queries are scaled to fit."""
    op = OPS[name]
    case = attention_case(4, 2, 64, [1], [70], S=64, C="e4m3")
    case |= {"scale": 0.125 / size, "eps": 1e-6, "h": 4, "R": 3, "q_norm": False, "k_norm": False}
    workload = case_workload(op, case, "bf16")
    x = workload.ins[0]
    x[:, : 4 * 64] = (x[:, : 4 * 64].astype(np.float32) * size).astype(x.dtype)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice()))
