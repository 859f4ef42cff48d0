"""The training of one model on one backend: a step's passes, the update of its weights, and what is kept of them.

A step is two captured graphs: the pass over a batch (forward, loss, gradients: ``step.py``), once for each batch of the
step, and the update (the norm of all gradients, the optimizer). The host only writes their inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..backends import Backend, CapturedGraph
from ..dtypes import DTYPES, Array
from ..engine.input_buffer import InputBuffer
from ..errors import CheckpointError, ParameterError
from ..files import writing
from ..models.config import ModelConfig
from ..models.export import checkpoint_tensors
from ..models.rope import RotationTables
from ..ops.node import Node
from ..quant.weight import Weight
from .backward import gradient_name
from .batch import Batch
from .muon import layer_matrices
from .parameters import Parameters
from .passes import Passes, rotation_tables
from .saving import Staging, saved_together
from .settings import TrainingSettings
from .step import LOSS, Teacher, array_shapes, evaluation_nodes, teacher_value, training_step
from .update import update_nodes, update_values

__all__ = ["Files", "GuidingModel", "Step", "Trainer"]

_F32 = DTYPES["f32"]


@dataclass(frozen=True)
class GuidingModel:
    """A teacher: a model of the same vocabulary, whose predictions the trained model learns. weights: as of a
    ``Trainer``."""

    config: ModelConfig
    weights: Mapping[str, Weight]


class Step:
    """A step that is queued. Its numbers are there when the backend has come so far; asking for them waits.

    They are where the next step or evaluation puts its own: asked for later than that, they raise ParameterError.
    """

    def __init__(self, read: Any) -> None:
        self._read = read
        self._numbers: tuple[float, float] | None = None

    def wait(self) -> tuple[float, float]:
        """(loss, norm of the gradients)."""
        if self._numbers is None:
            self._numbers = self._read()
        return self._numbers

    @property
    def loss(self) -> float:
        """The mean loss of the step's tokens, before the update."""
        return self.wait()[0]

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients together, before they are clipped."""
        return self.wait()[1]


class Files(Protocol):
    """The files of the folder that a model is saved to."""

    def write(self, staging: Staging, trainer: Trainer) -> None:
        """All of them."""


class Trainer:
    """Trains a model, or the adapters of a model whose weights stay as they are. ``open_trainer`` makes one of a model.

    parameters: the weights that are trained; done: updates so far; files: what ``save`` writes, None where the trainer
    was made of a config and arrays.
    """

    files: Files | None = None

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray[Any, Any] | Weight],
        settings: TrainingSettings,
        backend: Backend,
        context: int,
        teachers: Sequence[GuidingModel] = (),
        owns_backend: bool = False,
    ) -> None:
        """weights: canonical name -> first values, of any float dtype; with adapters in ``config``, theirs are trained
        and the others, which may be quantised, are not. context: tokens of a document at most; teachers: models to
        learn from; owns_backend: whether ``close`` closes the backend as well.

        Raises ParameterError, CheckpointError, and DeviceError where memory is short.
        """
        self.config, self.settings, self._backend = config, settings, backend
        self._context, self._owns_backend = context, owns_backend
        self.done = 0
        self._queued = 0  # steps and evaluations: the last one has written LOSS
        self._open = True
        self._tied = config.tied is not False and _same(weights)
        trained = self._trained()
        # Teachers' logits, which go with the model's, are as wide as the vocabulary.
        rounded = () if teachers else ("embed_tokens", "lm_head")
        self._matrices = layer_matrices(config) if settings.optimizer == "muon" else {}
        first = {name: _numbers(weights[name]) for name in trained}
        self.parameters = Parameters(backend, first, rounded, self._matrices)
        self._values = {**self._frozen(weights), **self.parameters.weights}
        self._values |= {LOSS: backend.zeros((1,), _F32)}
        self._gradients = {gradient_name(name): array for name, array in self.parameters.gradients.items()}
        if self._tied:
            self._values["lm_head"] = self._values["embed_tokens"]
            if "embed_tokens" in trained:
                self._gradients[gradient_name("lm_head")] = self._gradients[gradient_name("embed_tokens")]
        self._names = (*trained, *(("lm_head",) if self._tied and "embed_tokens" in trained else ()))
        rotations = self._add_tables("", config, context)
        self._teachers = [self._add_teacher(i, teacher, context) for i, teacher in enumerate(teachers)]
        backend.end_loading()
        self._passes = Passes(backend, self._step_nodes, rotations)
        self._evaluation = Passes(backend, self._evaluation_nodes, rotations, self._passes)
        self._schedule = InputBuffer(backend, {"schedule": np.zeros(3, np.float32)})
        self._squares = backend.zeros((1,), _F32)
        update, values = update_nodes(settings, self._matrices), self._update_values()
        self._update: CapturedGraph = backend.capture(lambda: _run(backend, update, values))

    # -- steps

    def step(self, batches: Sequence[Batch], lr: float) -> Step:
        """Queue a step: the gradients of all batches, added up, and one update. lr: its learning rate.

        The batches' weights add up to 1. The numbers of a step have to be asked for before the next is queued. Raises
        ParameterError for a batch that does not fit the model.
        """
        settings = self.settings
        for batch in batches:
            batch.check(self.config.vocab_size, self._context)
        self._queued += 1
        for array in (self._values[LOSS], self._squares):
            self._backend.write(array, np.zeros(1, np.float32))
        for number, batch in enumerate(batches):
            self._passes.run(batch, **self._noise(number))
        t = self.done + 1
        self._schedule.host["schedule"][:] = lr, 1 / (1 - settings.beta1**t), 1 / (1 - settings.beta2**t)
        self._schedule.send()
        self._update.replay()
        self.done = t
        return Step(partial(self._numbers_of_step, self._queued))

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The sum of the weighted losses of some batches. Raises ParameterError as ``step`` does."""
        self._queued += 1
        self._backend.write(self._values[LOSS], np.zeros(1, np.float32))
        for batch in batches:
            batch.check(self.config.vocab_size, self._context)
            self._evaluation.run(batch)
        return float(self._backend.download(self._values[LOSS])[0])

    def _numbers_of_step(self, queued: int) -> tuple[float, float]:
        if queued != self._queued:
            raise ParameterError("the numbers of a step have to be asked for before the next step or evaluation")
        loss = float(self._backend.download(self._values[LOSS])[0])
        return loss, float(np.sqrt(self._backend.download(self._squares)[0]))

    def _noise(self, number: int) -> dict[str, np.ndarray[Any, Any]]:
        """The seed of dropout in a pass: of the run, the step and the number of the batch in it."""
        if not self.settings.dropout:
            return {}
        words = np.random.SeedSequence([self.settings.seed, self.done, number]).generate_state(2)
        return {"dropout.seed": words.astype(np.uint32)}

    # -- what is kept

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All that the next steps depend on besides settings and data: ``done`` and the arrays of ``Parameters``."""
        return {"done": np.array([self.done], np.int64), **self.parameters.state()}

    def load_state(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Go on from what ``state`` gave. Raises ValueError for arrays of another model."""
        self.parameters.load_state(state)
        self.done = int(state["done"][0])

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """The trained weights on the host by canonical name, in the dtype of the model."""
        return self.parameters.weights_on_host()

    def export(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """(tensor name, array) of what is trained, as a checkpoint has it."""
        return checkpoint_tensors(self.config, self.weights())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model, or its adapters, to a folder that ``cuplama.load`` and others read. A file is whole or not
        there. Raises ParameterError where the files are not known, and CheckpointError for a disk that is full."""
        if self.files is None:
            raise ParameterError("the trainer was made of arrays and has no files to save; export() has its tensors")
        with writing(Path(folder), CheckpointError), saved_together(Path(folder)) as staging:
            self.files.write(staging, self)

    def close(self) -> None:
        """Give back graphs and memory, and close the backend if it is the trainer's own. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._passes.close()
        self._evaluation.close()
        self._update.close()
        self._values.clear()
        self._gradients.clear()
        del self.parameters
        if self._owns_backend:
            self._backend.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- making it ready

    def _trained(self) -> list[str]:
        """Canonical names of the weights that are trained; a tied head goes by the embedding's."""
        names = [name for name in self.config.weight_shapes() if not (self._tied and name == "lm_head")]
        return self.config.adapter_weights() or names

    def _frozen(self, weights: Mapping[str, np.ndarray[Any, Any] | Weight]) -> dict[str, Array]:
        trained = set(self._trained())
        rest = {
            name: w for name, w in weights.items() if name not in trained and not (self._tied and name == "lm_head")
        }
        return _load(self._backend, {name: w for name, w in rest.items() if isinstance(w, Weight)}) | {
            name: self._backend.upload(w) for name, w in rest.items() if not isinstance(w, Weight)
        }

    def _add_teacher(self, number: int, teacher: GuidingModel, context: int) -> Teacher:
        ropes = teacher.config.ropes.values()
        if not ropes and context > teacher.config.context:
            raise ParameterError(
                f"context = {context} is more than the {teacher.config.context} positions that a teacher learned"
            )
        if any(rope.regime(context) for rope in ropes):
            raise ParameterError(
                f"a teacher of rope type longrope sees at most {min(r.original for r in ropes)} tokens"
            )
        loaded = _load(self._backend, teacher.weights)
        self._values |= {teacher_value(number, name): array for name, array in loaded.items()}
        self._add_tables(teacher_value(number, ""), teacher.config, context)
        return Teacher(teacher.config, number)

    def _add_tables(self, prefix: str, config: ModelConfig, context: int) -> RotationTables:
        rotations = rotation_tables(config, context)
        for name, array in {**config.lora_parts(), **rotations.arrays}.items():
            self._values[f"{prefix}{name}"] = self._backend.upload(array)
        return rotations

    def _step_nodes(self, rows: int) -> tuple[Sequence[Node], Mapping[str, Array]]:
        settings, backend = self.settings, self._backend
        alpha = settings.teacher_share if self._teachers else 0.0
        plan = training_step(
            self.config, rows, self._names, settings.recompute, settings.dropout, self._teachers, alpha
        )
        # Others than those of the trained weights: of a norm that is not trained, or of the rows that are sliced.
        arrays = array_shapes(self.config, plan, backend.dtype).items()
        more = {name: backend.zeros(*array) for name, array in arrays if name not in self._gradients}
        return plan.nodes, {**self._values, **self._gradients, **more}

    def _evaluation_nodes(self, rows: int) -> tuple[Sequence[Node], Mapping[str, Array]]:
        return evaluation_nodes(self.config, rows), self._values

    def _update_values(self) -> dict[str, Array]:
        found = update_values(self.parameters, self._matrices)
        return {**found, "squares": self._squares, "schedule": self._schedule.device["schedule"]}


def _run(backend: Backend, nodes: Sequence[Node], values: dict[str, Array]) -> None:
    backend.run(nodes, values, ())


def _same(weights: Mapping[str, np.ndarray[Any, Any] | Weight]) -> bool:
    """Whether head and embedding are one matrix."""
    head, table = weights.get("lm_head"), weights["embed_tokens"]
    if isinstance(head, Weight) and isinstance(table, Weight):
        return head.source == table.source
    return head is None or head is table


def _numbers(weight: np.ndarray[Any, Any] | Weight) -> np.ndarray[Any, Any]:
    """All of a weight, float32."""
    if not isinstance(weight, Weight):
        return weight
    if weight.packed:
        raise ParameterError(f"{weight.name} is quantised; train adapters of it (lora), which leave it as it is")
    return weight.array().astype(np.float32)


def _load(backend: Backend, weights: Mapping[str, Weight]) -> dict[str, Array]:
    """Weights on the device, each once, however many names it has."""
    loaded = {w.source: backend.load_weight(w) for w in {w.source: w for w in weights.values()}.values()}
    return {name: loaded[w.source] for name, w in weights.items()}
