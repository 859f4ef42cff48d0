"""Muon: against the formula in float64 with singular values, on every family, and what a state goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cuplama.backends import Backend
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.ops import OPS
from cuplama.ops.launch import Device
from cuplama.train import Batch, Trainer, TrainingSettings
from cuplama.train.memory import plan
from cuplama.train.muon import layer_matrices, matrix_nodes
from tests.fakes import FakeGpu, HostCublas
from tests.train.goldens import TRAINING, Array, relative_error
from tests.train.test_trainer import assert_same_bits

FAMILIES = ("llama-3-kv-heads", "llama-biases", "gpt2", "phi3", "qwen2", "qwen3", "mistral-window")
LR, DECAY = 0.02, 0.1


def trainer(case: str, backend: Backend | None = None, **other: Any) -> Trainer:
    folder = TRAINING / case
    config = load_config(folder)
    given: dict[str, Any] = dict(optimizer="muon", lr=LR, weight_decay=DECAY, schedule="constant")
    settings = TrainingSettings(100, **given | other)
    return Trainer(config, load_weights(folder, config), settings, backend or NumPyBackend(), 48)


def ids_of(case: str) -> Array:
    return np.array(json.loads((TRAINING / case / "meta.json").read_text())["token_ids"])


# ---- one matrix ------------------------------------------------------------------------------------------------------


def updated(momentum: Array, T: str, backend: Backend | None = None) -> Array:
    """The step of a matrix with lr 1 and no decay: what is taken from weights of 0."""
    rows, columns = momentum.shape
    backend, zeros = backend or NumPyBackend(T), np.zeros(momentum.shape, np.float32)
    ins = {
        "w.p": zeros.astype(backend.dtype),
        "w.g": momentum.astype(np.float32),
        "w.master": zeros.copy(),
        "norm_squared": np.ones(1, np.float32),
        "schedule": np.ones(3, np.float32),
    }
    values = {name: backend.upload(array) for name, array in ins.items()}
    backend.run(matrix_nodes("w", rows, columns, 0.0), values, ())
    assert not backend.download(values["w.g"]).any()
    master = backend.download(values["w.master"])
    assert np.array_equal(backend.download(values["w.p"]), master.astype(backend.dtype))
    return -master


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (40, 24), (24, 40), (1, 30), (30, 1)])
@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_a_step_is_nearly_orthogonal(rows: int, columns: int, T: str) -> None:
    """It has the singular vectors of the momentum, and its singular values are 0.6 to 1.3 times its size."""
    momentum = np.random.default_rng(5).standard_normal((rows, columns))
    step = updated(momentum, T) / (0.2 * np.sqrt(max(rows, columns)))
    u, s, v = np.linalg.svd(momentum, full_matrices=False)
    assert s[0] / s[-1] < 100
    inner = u.T @ step.astype(np.float64) @ v.T
    assert np.diagonal(inner).min() > 0.6
    assert np.diagonal(inner).max() < 1.3
    assert np.abs(inner - np.diag(np.diagonal(inner))).max() < (1e-4 if T == "f32" else 0.05)
    assert relative_error(step, (u * np.diagonal(inner)) @ v) < (1e-4 if T == "f32" else 0.05)


def test_a_step_is_as_large_as_one_of_adamw() -> None:
    """The root of the mean of its squares is about 0.2, whatever the size of the gradients."""
    momentum = 1e-4 * np.random.default_rng(6).standard_normal((64, 96))
    assert 0.15 < np.sqrt(np.mean(np.square(updated(momentum, "f32")))) < 0.25


def test_without_a_gradient_there_is_no_step() -> None:
    assert not updated(np.zeros((8, 12)), "bf16").any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_changes_nothing(bad: float) -> None:
    rng = np.random.default_rng(7)
    g, m = rng.standard_normal((2, 96)).astype(np.float32)
    before = m.copy()
    g[3] = bad
    norm_squared = np.array([bad], np.float32)
    OPS["muon_momentum"].reference(g, m, norm_squared, beta=0.95, clip=1.0)
    assert not g.any()
    assert np.array_equal(m, before)
    master = rng.standard_normal((8, 12)).astype(np.float32)
    p, g = master.copy(), np.ones((8, 12), np.float32)
    x = rng.standard_normal((8, 12)).astype(np.float32)
    OPS["muon_update"].reference(p, g, master, x, norm_squared, np.ones(3, np.float32), weight_decay=0.1)
    assert np.array_equal(p, master)
    assert not g.any()


# ---- a model ---------------------------------------------------------------------------------------------------------


def newton_schulz(x: Array) -> Array:
    """The polynomial on the singular values, in float64."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s /= np.linalg.norm(s) + 1e-7
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return np.asarray((u * s) @ v)


def stepped(weight: Array, momentum: Array, gradient: Array, norm: float) -> tuple[Array, Array]:
    """(weight, momentum) after a step, in float64."""
    g = gradient * min(1.0, 1.0 / (norm + 1e-6))
    momentum = 0.95 * momentum + g
    direction = newton_schulz(g + 0.95 * momentum)
    return weight * (1 - LR * DECAY) - LR * 0.2 * np.sqrt(max(weight.shape)) * direction, momentum


def gradients_of(model: Trainer, batch: Batch) -> Mapping[str, Array]:
    """Those of the weights as they are, which a step with a learning rate of nearly 0 leaves alone."""
    copy = trainer("llama-biases", grad_clip=0.0)
    copy.load_state({**model.state(), "m": np.zeros_like(model.state()["m"])})
    copy.step([batch], 1e-12).wait()
    return {name: array.copy() for name, array in copy.parameters.views(copy.state()["m"]).items()}


def test_steps_are_those_of_the_formula() -> None:
    """q, k, v, gate and up each for itself, twice, with clipped gradients; what is no matrix of a layer by AdamW."""
    model, batch = trainer("llama-biases"), Batch.of_rows(ids_of("llama-biases"))
    config = model.config
    rows = np.cumsum([0, *[config.num_heads * config.head_dim], *[config.num_kv_heads * config.head_dim] * 2])
    cuts = {"0.qkv_proj": rows, "1.gate_up_proj": np.array([0, 1, 2]) * config.intermediate_size,
            "0.down_proj": np.array([0, config.hidden_size])}  # fmt: skip
    weights = {name: model.parameters.views(model.state()["master"])[name].astype(np.float64) for name in cuts}
    momenta = {name: np.zeros_like(array) for name, array in weights.items()}
    for _ in range(2):
        gradients = gradients_of(model, batch)
        norm = model.step([batch], LR).grad_norm
        assert norm > 1  # it is clipped
        for name, at in cuts.items():
            for first, end in pairwise(at):
                part = slice(first, end)
                weights[name][part], momenta[name][part] = stepped(
                    weights[name][part], momenta[name][part], gradients[name][part].astype(np.float64), norm
                )
    for name, wanted in weights.items():
        found = model.parameters.views(model.state()["master"])[name]
        assert relative_error(found, wanted) < 1e-5, name
    v = model.parameters.views(model.state()["v"])
    for name, array in v.items():
        assert array.any() == (name not in layer_matrices(config)), name


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_learns(case: str) -> None:
    """The matrices are those that linear layers multiply with, and all of them change."""
    model, batch = trainer(case), Batch.of_rows(ids_of(case))
    names = layer_matrices(model.config)
    shapes = model.config.weight_shapes()
    kinds = {name.partition(".")[2] for name in names}
    assert kinds == {"qkv_proj", "o_proj", "down_proj", "up_proj" if case == "gpt2" else "gate_up_proj"}
    for name, matrices in names.items():
        assert sum(rows for rows, _ in matrices) == shapes[name][0]
        assert {columns for _, columns in matrices} == {shapes[name][1]}
        assert len(matrices) == {"qkv_proj": 3, "gate_up_proj": 2}.get(name.partition(".")[2], 1)
    before = {name: array.copy() for name, array in model.weights().items()}
    losses = [model.step([batch], LR).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.3
    after = model.weights()
    assert all((after[name] != before[name]).any() for name in names)


def test_a_state_goes_on_bit_for_bit() -> None:
    case = "gpt2"
    whole, first, second = (trainer(case) for _ in range(3))
    batches = [Batch.of_rows(ids[None]) for ids in ids_of(case)]
    for batch in batches:
        whole.step([batch], LR).wait()
    first.step(batches[:1], LR).wait()
    second.load_state({name: array.copy() for name, array in first.state().items()})
    for batch in batches[1:]:
        second.step([batch], LR).wait()
    assert len(batches) > 1
    assert_same_bits(whole, second)
    assert {name: array.shape for name, array in whole.state().items()} == {
        name: array.shape for name, array in trainer(case, optimizer="adamw").state().items()
    }


def test_memory_for_its_products_is_planned() -> None:
    """With AdamW there is none of it. x and its successor, and three squares of the shorter side, at the worst."""
    config = load_config(TRAINING / "gpt2")
    names = list(config.weight_shapes())
    muon, adamw = (
        plan(config, TrainingSettings(1, optimizer=name), names, 0, 32, DTYPES["bf16"], Device())
        for name in ("muon", "adamw")
    )
    d, f = config.hidden_size, config.intermediate_size
    assert 2 * 2 * d * f <= muon.activations - adamw.activations <= 2 * (2 * d * f + 3 * d * d) + 4096


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_steps_on_the_emulator(T: str) -> None:
    """The kernels' own text gives the matrices that the references give."""
    momentum = np.random.default_rng(8).standard_normal((36, 20))
    gpu: Any = FakeGpu(emulate=True, cublas=HostCublas())
    for given in (momentum, momentum.T.copy()):
        found, wanted = updated(given, T, CudaBackend(T, gpu=gpu)), updated(given, T)
        assert relative_error(found, wanted) < (1e-5 if T == "f32" else 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("T", ["f32", "bf16"])
def test_steps_on_a_gpu(T: str) -> None:
    """They repeat bit for bit, and the losses follow those of NumPy."""
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    batch = Batch.of_rows(ids_of("llama-biases"))
    models = [trainer("llama-biases", backend) for backend in (CudaBackend(T), CudaBackend(T), NumPyBackend())]
    first, second, wanted = [[model.step([batch], LR).loss for _ in range(6)] for model in models]
    assert first == second
    assert_same_bits(models[0], models[1])
    np.testing.assert_allclose(first, wanted, atol=1e-3 if T == "f32" else 0.05)
