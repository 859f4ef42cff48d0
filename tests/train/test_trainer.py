"""Steps of a whole model: ten of AdamW against torch's in float64, batches cut in other ways, and the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cuplama.backends import Backend
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.numpy import NumPyBackend
from cuplama.errors import ParameterError
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.train import Batch, Trainer, TrainingSettings
from cuplama.train.trainer import GuidingModel
from tests.fakes import FakeGpu, HostCublas
from tests.train.goldens import TRAINING, Array, relative_error

LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 2e-5  # of the norm of the gradients of a step
# Of the norm of what ten steps change in a weight. AdamW divides a gradient by its own size, so one that is nearly 0
# is as large a step as any other, and its rounding counts in full: one matrix is off by 4e-4.
CHANGE_TOLERANCE = 2e-3
CONTEXT = 48  # tokens of a document at most
STEPS: dict[str, Any] = json.loads((TRAINING / "adamw.json").read_text())
FOLDER = TRAINING / STEPS["settings"]["case"]
IDS = np.array(STEPS["token_ids"])

Made = Callable[..., Trainer]


def settings(**other: Any) -> TrainingSettings:
    """Those of the golden steps, or others."""
    given = {name: value for name, value in STEPS["settings"].items() if name not in ("case", "floor")}
    return TrainingSettings(steps=len(IDS), **{**given, **other})


@pytest.fixture
def make() -> Iterator[Made]:
    """Makes trainers of the golden model and closes them."""
    made = []

    def one(backend: Backend | None = None, **other: Any) -> Trainer:
        config = load_config(FOLDER)
        weights = load_weights(FOLDER, config)
        made.append(Trainer(config, weights, settings(**other), backend or NumPyBackend(), CONTEXT))
        return made[-1]

    yield one
    for trainer in made:
        trainer.close()


def take(trainer: Trainer, batches: Array = IDS) -> list[tuple[float, float]]:
    """A step for each batch of rows [B, T+1]: (loss, norm of the gradients)."""
    rate = trainer.settings.learning_rate
    return [trainer.step([Batch.of_rows(ids)], rate(i)).wait() for i, ids in enumerate(batches, 1)]


def check_steps(trainer: Trainer) -> None:
    """Losses, norms and weights are torch's."""
    found = take(trainer)
    for (loss, norm), wanted in zip(found, STEPS["steps"], strict=True):
        assert abs(loss - wanted["loss"]) <= LOSS_TOLERANCE
        assert abs(norm / wanted["grad_norm"] - 1) <= NORM_TOLERANCE
    weights, first = dict(trainer.export()), load_file(FOLDER / "model.safetensors")
    wanted_weights = load_file(TRAINING / "adamw.safetensors")
    assert weights.keys() == wanted_weights.keys()
    for name, wanted in wanted_weights.items():
        assert relative_error(weights[name] - first[name], wanted - first[name]) <= CHANGE_TOLERANCE, name


def test_steps_on_numpy(make: Made) -> None:
    check_steps(make())


def test_learning_rates_are_those_of_the_golden_steps() -> None:
    for row in STEPS["steps"]:
        assert settings().learning_rate(row["step"]) == pytest.approx(row["lr"], rel=1e-12)
    assert max(row["lr"] for row in STEPS["steps"]) == pytest.approx(STEPS["settings"]["lr"])


def test_same_steps_same_bits(make: Made) -> None:
    first, second = make(), make()
    assert take(first, IDS[:3]) == take(second, IDS[:3])
    assert_same_bits(first, second)


def assert_same_bits(one: Trainer, other: Trainer) -> None:
    for (name, a), b in zip(one.state().items(), other.state().values(), strict=True):
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), name


def test_a_state_goes_on_bit_for_bit(make: Made) -> None:
    whole, first, second = make(), make(), make()
    take(whole, IDS[:4])
    take(first, IDS[:2])
    second.load_state({name: array.copy() for name, array in first.state().items()})
    assert second.done == 2
    for i, ids in enumerate(IDS[2:4], 3):
        second.step([Batch.of_rows(ids)], settings().learning_rate(i)).wait()
    assert_same_bits(whole, second)


# ---- batches cut in other ways ---------------------------------------------------------------------------------------


def batch_of(documents: Sequence[Array], total: int, empty: int = 0) -> Batch:
    """Whole documents one behind the other. total: tokens that are learned in the step; empty: documents at the end."""
    lengths = [len(d) - 1 for d in documents]
    n = sum(lengths)
    return Batch(
        input_ids=np.concatenate([d[:-1] for d in documents]).astype(np.int32),
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        targets=np.concatenate([d[1:] for d in documents]).astype(np.int32),
        weights=np.full(n, 1 / total, np.float32),
        bounds=np.concatenate([[0], np.cumsum(lengths), [n] * empty]).astype(np.int32),
    )


def gradients_of(trainer: Trainer, batches: Sequence[Batch]) -> tuple[float, Array]:
    """(loss, all gradients) of a first step: AdamW's mean of gradients is then a part of them."""
    loss = trainer.step(batches, 1e-6).loss
    return loss, trainer.state()["m"] / (1 - trainer.settings.beta1)


def test_documents_in_one_row_do_not_see_each_other(make: Made) -> None:
    """Their gradients are those of a row for each."""
    row = IDS[0].reshape(-1)
    documents, total = [row[:10], row[10:12], row[12:36]], 9 + 1 + 23
    together = gradients_of(make(grad_clip=0), [batch_of(documents, total)])
    apart = gradients_of(make(grad_clip=0), [batch_of([d], total) for d in documents])
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    assert relative_error(together[1], apart[1]) <= 1e-6
    joined = gradients_of(make(grad_clip=0), [batch_of([np.concatenate([*documents[::2], row[10:12]])], total)])
    assert relative_error(together[1], joined[1]) > 1e-2  # one document of the same tokens is another thing


def test_empty_documents_change_no_bit(make: Made) -> None:
    documents = [IDS[0, 0], IDS[0, 1]]
    plain, padded = (gradients_of(make(), [batch_of(documents, 46, empty)]) for empty in (0, 2))
    assert plain[0] == padded[0]
    assert np.array_equal(plain[1], padded[1])


def test_a_token_of_weight_0_is_not_learned(make: Made) -> None:
    """What would follow it makes no difference, though the tokens after it see it."""
    batch, other = batch_of([IDS[0, 0]], 22), batch_of([IDS[0, 0]], 22)
    batch.weights[5] = other.weights[5] = 0
    other.targets[5] = (other.targets[5] + 1) % 7
    (loss, gradients), (same, equal) = (gradients_of(make(), [b]) for b in (batch, other))
    assert loss == same
    assert np.array_equal(gradients, equal)
    assert relative_error(gradients, gradients_of(make(), [batch_of([IDS[0, 0]], 22)])[1]) > 1e-3


def test_rows_of_a_batch_may_come_one_by_one(make: Made) -> None:
    rows = list(IDS[0])
    total = IDS[0][:, 1:].size
    whole = gradients_of(make(grad_clip=0), [Batch.of_rows(IDS[0])])
    cut = gradients_of(make(grad_clip=0), [batch_of([row], total) for row in rows])
    assert whole[0] == pytest.approx(cut[0], rel=1e-6)
    assert relative_error(cut[1], whole[1]) <= 1e-6


@pytest.mark.parametrize("recompute", ["cheap", "layers"])
def test_what_is_computed_again_changes_no_bit(make: Made, recompute: str) -> None:
    kept, again = make(), make(recompute=recompute)
    assert take(kept, IDS[:2]) == take(again, IDS[:2])
    assert_same_bits(kept, again)


# ---- what a loop of one's own may do wrong ---------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_the_model_is_refused(make: Made) -> None:
    """A kernel would read beyond the end of a table, or write there."""
    trainer, vocab_size = make(), load_config(FOLDER).vocab_size
    for ids, said in (
        (np.full((1, 5), vocab_size), f"token ids {vocab_size} to {vocab_size}; ids are 0 to {vocab_size - 1}"),
        (np.array([[1, 2, -100]]), "token ids -100 to 2"),
        (np.ones((1, CONTEXT + 2), int), f"has {CONTEXT + 1} tokens; context = {CONTEXT} is the most"),
    ):
        with pytest.raises(ParameterError, match=said):
            trainer.step([Batch.of_rows(ids)], 1e-3)
        with pytest.raises(ParameterError, match=said):
            trainer.evaluate([Batch.of_rows(ids)])
    torn = replace(Batch.of_rows(IDS[0]), bounds=np.array([0, 9, 4, IDS[0][:, 1:].size], np.int32))
    with pytest.raises(ParameterError, match="bounds of a batch go from 0 to its"):
        trainer.step([torn], 1e-3)
    assert trainer.done == 0


def test_a_teacher_with_too_few_positions_is_refused() -> None:
    config, teacher = load_config(FOLDER), load_config(TRAINING / "gpt2")
    guide, limit = GuidingModel(teacher, {}), teacher.context
    with pytest.raises(
        ParameterError, match=f"context = {limit + 1} is more than the {limit} positions that a teacher"
    ):
        Trainer(config, load_weights(FOLDER, config), settings(), NumPyBackend(), limit + 1, [guide])


def test_the_numbers_of_a_step_are_not_those_of_the_next(make: Made) -> None:
    trainer, batch = make(), Batch.of_rows(IDS[0])
    first = trainer.step([batch], 1e-3)
    assert first.loss > 0
    second = trainer.step([batch], 1e-3)
    assert first.loss != second.loss  # what was read stays
    third = trainer.step([batch], 1e-3)
    trainer.evaluate([batch])
    with pytest.raises(ParameterError, match="asked for before the next step or evaluation"):
        third.wait()


def test_weights_and_state_are_copies(make: Made) -> None:
    trainer = make()
    weights, state = trainer.weights(), trainer.state()
    shapes = trainer.config.weight_shapes()
    assert {name: array.shape for name, array in weights.items()} == {name: shapes[name] for name in weights}
    before = [array.copy() for array in (*weights.values(), *state.values())]
    take(trainer, IDS[:1])
    assert all(np.array_equal(a, b) for a, b in zip((*weights.values(), *state.values()), before, strict=True))
    assert not np.array_equal(trainer.state()["master"], state["master"])


def test_evaluation_takes_the_memory_of_the_steps(make: Made) -> None:
    """It has no plan of its own: what a step needs has to be enough."""
    gpu: Any = FakeGpu()
    trainer = make(CudaBackend("f32", gpu=gpu))
    trainer.step([Batch.of_rows(IDS[0])], 1e-3)
    pools = {id(pool) for pool in gpu.pools}
    trainer.evaluate([Batch.of_rows(IDS[0]), batch_of([IDS[0, 0]], 22)])
    assert {id(pool) for pool in gpu.pools} == pools
    assert len(pools) == 3  # the main one, and those of passes and updates


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_on_the_emulator(make: Made) -> None:
    gpu: Any = FakeGpu(emulate=True, cublas=HostCublas())
    found = take(make(CudaBackend("f32", gpu=gpu)), IDS[:3])
    for (loss, norm), wanted in zip(found, STEPS["steps"], strict=False):
        assert abs(loss - wanted["loss"]) <= LOSS_TOLERANCE
        assert abs(norm / wanted["grad_norm"] - 1) <= NORM_TOLERANCE


@pytest.fixture
def cuda() -> Iterator[Callable[[str], Backend]]:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    opened = []

    def backend(dtype: str) -> Backend:
        opened.append(CudaBackend(dtype))
        return opened[-1]

    yield backend
    for one in opened:
        one.close()


@pytest.mark.gpu
def test_steps_on_a_gpu(make: Made, cuda: Callable[[str], Backend]) -> None:
    check_steps(make(cuda("f32")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_same_bits_on_a_gpu(make: Made, cuda: Callable[[str], Backend], dtype: str) -> None:
    first, second, again = make(cuda(dtype)), make(cuda(dtype)), make(cuda(dtype), recompute="layers")
    losses = take(first, IDS[:4])
    assert losses == take(second, IDS[:4]) == take(again, IDS[:4])
    assert_same_bits(first, second)
    assert_same_bits(first, again)


@pytest.mark.gpu
def test_bf16_learns_on_a_gpu(make: Made, cuda: Callable[[str], Backend]) -> None:
    """The losses follow those of float64, and fall as they do."""
    found = take(make(cuda("bf16")))
    for (loss, _), wanted in zip(found, STEPS["steps"], strict=True):
        assert abs(loss - wanted["loss"]) <= 2e-2
