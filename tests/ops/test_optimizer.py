"""The kernels of optimizer.cu as a training uses them, on the emulator: step after step, on parts of one flat array,
and with the weights of a model in float32, which are their own masters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.lab.check import Executor
from cuplama.lab.emulation import EmulatedDevice
from cuplama.ops import OPS
from cuplama.ops.binding import bind_plan
from cuplama.ops.launch import Device

Floats = np.ndarray[Any, Any]
_SETTINGS: dict[str, Any] = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, clip=0.5)
_LR, _STEPS = 3e-3, 10


def _launch(name: str, *ins: Floats, executor: Executor | None = None, **attrs: float) -> dict[str, Any]:
    """Run an op's kernels on arrays, which are changed in place; the op's arrays by name."""
    executor, op = executor or EmulatedDevice(), OPS[name]
    call = op.bind(ins, attrs)
    assert op.kernels is not None

    def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Floats:
        return np.full(shape, np.nan, dtype)

    for bound in bind_plan(op.kernels(call, executor.device), call, empty, empty):
        executor.launch(bound)
    return call.arrays


def _schedule(step: int) -> Floats:
    return np.array([_LR, 1 / (1 - 0.9**step), 1 / (1 - 0.999**step)], np.float32)


def _gradients(n: int) -> Floats:
    return np.random.default_rng(3).standard_normal((_STEPS, n)).astype(np.float32)


def _torch_adamw(weights: Floats, gradients: Floats) -> Floats:
    """torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW with their defaults but for the weight decay, in float64."""
    p, m, v = weights.astype(np.float64), np.zeros(weights.size), np.zeros(weights.size)
    for step, g in enumerate(gradients.astype(np.float64), 1):
        g = g * min(1.0, _SETTINGS["clip"] / (np.linalg.norm(g) + 1e-6))
        p = p * (1 - _LR * 0.1)
        m = m + (g - m) * (1 - 0.9)
        v = v * 0.999 + g * g * (1 - 0.999)
        denominator = np.sqrt(v) / np.sqrt(1 - 0.999**step) + 1e-8
        p = p - _LR / (1 - 0.9**step) * m / denominator
    return p


@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_ten_steps_are_those_of_torch(T: str) -> None:
    """With the norm of square_sum. In f32 the weights are the masters, one array."""
    n = 1003
    master = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    want = _torch_adamw(master, _gradients(n))
    p = master if T == "f32" else master.astype(DTYPES[T])
    g, m, v = np.zeros((3, n), np.float32)
    for step, gradient in enumerate(_gradients(n), 1):
        g[:] = gradient
        norm_squared = _launch("square_sum", g)["total"]
        _launch("adamw", p, g, m, v, master, norm_squared, _schedule(step), **_SETTINGS)
        assert not g.any()
    np.testing.assert_allclose(master, want, rtol=_STEPS * 2.0**-24, atol=1e-7)  # a weight is rounded once a step
    assert np.array_equal(p, master.astype(DTYPES[T]))


@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_a_part_of_a_flat_array_may_begin_anywhere(T: str) -> None:
    check_parts(EmulatedDevice(), T)


def check_parts(executor: Executor, T: str) -> None:
    """Both ops on parts of larger arrays: bit for bit as at the start of an array, and the rest is left alone."""
    n = 2050
    rng = np.random.default_rng(2)
    ins = [rng.standard_normal(n).astype(DTYPES[T]), *rng.standard_normal((4, n)).astype(np.float32)]
    ins[3] = np.abs(ins[3])
    results = []
    for before in (0, 1, 2, 3):
        whole = [np.concatenate([np.full(before, 7, x.dtype), x, np.full(5, 7, x.dtype)]) for x in ins]
        parts = [x[before : before + n] for x in whole]
        _launch("adamw", *parts, np.ones(1, np.float32), _schedule(3), executor=executor, **_SETTINGS)
        total = _launch("square_sum", parts[4], executor=executor)["total"]
        for x in whole:
            assert (x[:before] == 7).all()
            assert (x[before + n :] == 7).all()
        results.append([x.tobytes() for x in parts])
        np.testing.assert_allclose(total, np.square(parts[4], dtype=np.float64).sum(), rtol=1e-6)
    assert results[1:] == results[:1] * 3


def test_the_norm_does_not_depend_on_the_gpu() -> None:
    g = np.random.default_rng(4).standard_normal(30000).astype(np.float32)
    small, large = (_launch("square_sum", g, executor=EmulatedDevice(Device(sms=sms)))["total"] for sms in (2, 132))
    assert small.tobytes() == large.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_reaches_the_norm(bad: float) -> None:
    g = np.ones(20000, np.float32)
    g[12345] = bad
    assert not np.isfinite(_launch("square_sum", g)["total"][0])
