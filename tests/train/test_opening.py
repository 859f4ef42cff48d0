"""The device of a training, with a GPU that is not there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.errors import DeviceError
from cuplama.models.new_adapter import new_adapter
from cuplama.models.rounding import round_weights
from cuplama.ops.launch import Device
from cuplama.train import memory
from cuplama.train.initial import initial_weights
from cuplama.train.opening import open_training_backend
from cuplama.train.settings import TrainingSettings
from cuplama.train.trainer import GuidingModel
from tests.fakes import FakeGpu
from tests.train.made import config


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU that works and has 1 GB free."""
    found = FakeGpu()
    monkeypatch.setattr(found, "free_memory", lambda: 10**9)
    monkeypatch.setattr("cuplama.train.opening.cuda_available", lambda: (True, ""))
    monkeypatch.setattr("cuplama.backends.cuda.gpu.Gpu", lambda: found)
    return found


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("dtype", "short"), [("auto", "bf16"), ("bfloat16", "bf16"), ("float32", "f32")])
def test_a_gpu_is_taken_where_there_is_one(dtype: str, short: str) -> None:
    settings = TrainingSettings(1, dtype=dtype)
    backend = open_training_backend(settings, c := config(), initial_weights(c, 0), 64)
    assert (backend.name, backend.dtype) == ("cuda", DTYPES[short])


def test_a_gpu_without_bfloat16_trains_in_float32(gpu: FakeGpu) -> None:
    gpu.limits = Device(arch=75)
    weights = initial_weights(c := config(), 0)
    assert open_training_backend(TrainingSettings(1), c, weights, 64).dtype == DTYPES["f32"]
    with pytest.raises(DeviceError, match=r"\(sm_75\) has no bfloat16; --dtype float32"):
        open_training_backend(TrainingSettings(1, dtype="bfloat16"), c, weights, 64)


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    settings = TrainingSettings(1, batch_size=100_000)
    with pytest.raises(DeviceError, match=r"the training needs .* GB .*a smaller --batch-size with --accumulate"):
        open_training_backend(settings, c := config(), initial_weights(c, 0), 64)
    with pytest.raises(DeviceError, match="head_dim = 12: the CUDA kernels take multiples of 8"):
        open_training_backend(TrainingSettings(1), c := config(head_dim=12), initial_weights(c, 0), 64)


def test_teachers_need_memory_too(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights, and what a pass of theirs takes."""
    settings, c, wide = TrainingSettings(1, batch_size=64), config(), config(hidden_size=256, num_hidden_layers=8)
    weights, guides = initial_weights(c, 0), [GuidingModel(wide, initial_weights(wide, 0))]
    f32, names = DTYPES["f32"], list(c.weight_shapes())
    alone, taught = (memory.plan(c, settings, names, 0, 64, f32, gpu.limits, t) for t in ([], [wide]))
    assert taught.activations > alone.activations + 64 * 64 * 256 * 4  # the teacher's residual stream
    monkeypatch.setattr(gpu, "free_memory", lambda: taught.total)
    settings = replace(settings, dtype="float32")
    open_training_backend(settings, c, weights, 64)
    with pytest.raises(DeviceError, match=r"frozen weights 0\.0\d \+ activations"):
        open_training_backend(settings, c, weights, 64, guides)


@pytest.mark.usefixtures("gpu")
def test_room_for_the_largest_quantised_matrix_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient takes all of its numbers, in T."""
    c, frozen, plan = new_adapter(config(hidden_size=64), 2), list[int](), memory.plan

    def noted(*given: Any) -> memory.TrainingMemory:
        frozen.append(given[3])
        return plan(*given)

    weights = round_weights(initial_weights(config(hidden_size=64), 0), config(hidden_size=64), "int8")
    monkeypatch.setattr(memory, "plan", noted)
    open_training_backend(TrainingSettings(1, lora=2), c, weights, 64)
    stored = sum(w.device_bytes(DTYPES["bf16"]) for w in {w.source: w for w in weights.values()}.values())
    assert frozen == [stored + 2 * max(math.prod(w.shape) for w in weights.values() if w.packed)]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("cuplama.train.opening.cuda_available", lambda: (False, "no driver"))
    weights = initial_weights(c := config(), 0)
    backend = open_training_backend(TrainingSettings(1), c, weights, 64)
    assert isinstance(backend, NumPyBackend)
    assert backend.dtype == DTYPES["f32"]
    assert caplog.messages == ["training on NumPy: no driver"]
    settings = TrainingSettings(1, device="numpy", dtype="bfloat16")
    assert open_training_backend(settings, c, weights, 64).dtype == DTYPES["bf16"]
    with pytest.raises(DeviceError, match="device cuda cannot be used: no driver"):
        open_training_backend(TrainingSettings(1, device="cuda"), c, weights, 64)
