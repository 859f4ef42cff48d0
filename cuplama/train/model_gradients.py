"""The loss of a loaded model on some tokens and its gradients, as NumPy arrays: for those who want to look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array
from ..errors import ParameterError
from ..model import Model
from ..models.config import ModelConfig
from ..models.export import checkpoint_tensors
from ..ops.weights import segments_of
from .backward import gradient_name
from .batch import Batch
from .passes import Passes, rotation_tables
from .step import LOSS, StepPlan, array_shapes, training_step

__all__ = ["gradients"]


def gradients(
    model: Model, token_ids: np.ndarray[Any, Any] | Sequence[Sequence[int]]
) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
    """(loss, gradients) of a model. The model is not changed.

    token_ids: int [B, T+1], B texts of one length; the loss is the mean cross entropy of the B*T tokens that follow
    another. The gradients are by tensor name and in the tensors' shapes as the checkpoint has them, float32. A head
    that is tied to the embedding has no gradient of its own: the two are added up. Of a model with an adapter they are
    the adapter's, by PEFT's names, as in training: the model itself may then be quantised. In float16 small numbers on
    the way become 0.

    Raises ParameterError for token ids that do not fit the model, and for weights that the device holds quantised,
    which have no gradients. (On NumPy they are numbers like any other.)
    """
    runner, backend, config = model.engine.runner, model.backend, model.config
    batch = Batch.of_rows(token_ids)
    longest = int(batch.bounds[1])  # all texts are of one length
    batch.check(config.vocab_size, longest if config.ropes else config.context)
    weights = {name: runner.values[name] for name in config.weight_shapes()}
    trained = {name: weights[name] for name in config.adapter_weights()} or weights
    if packed := next((name for name, array in trained.items() if segments_of(array) is not None), None):
        raise ParameterError(f"{packed} is quantised; gradients are of plain weights, and of adapters")
    rotations = rotation_tables(config, longest)
    plan = training_step(config, batch.rows, trained)
    parts = {name: runner.values[name] for name in config.lora_parts()}
    sums = _sums(backend, config, plan, trained)
    values = {LOSS: backend.zeros((1,), DTYPES["f32"]), **weights, **parts, **sums}
    values |= {name: backend.upload(table) for name, table in rotations.arrays.items()}
    passes = Passes(backend, lambda rows: (plan.nodes, values), rotations)
    try:
        passes.run(batch)
        loss = float(backend.download(values[LOSS])[0])
    finally:
        passes.close()
    own = {id(trained[name]): name for name in reversed(trained)}  # the first of the names of an array
    found = {name: backend.download(sums[gradient_name(name)]) for name in own.values()}
    return loss, {name: np.ascontiguousarray(array) for name, array in checkpoint_tensors(config, found)}


def _sums(backend: Backend, config: ModelConfig, plan: StepPlan, trained: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays that gradients are added up in, by name. A tied head adds to the embedding's."""
    arrays, into, found = array_shapes(config, plan, backend.dtype), dict[int, Array](), dict[str, Array]()
    for name, array in trained.items():
        if id(array) not in into:
            into[id(array)] = backend.zeros(*arrays[gradient_name(name)])
        found[gradient_name(name)] = into[id(array)]
    return {name: backend.zeros(*array) for name, array in arrays.items() if name not in found} | found
