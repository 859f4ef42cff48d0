"""The loss of a loaded model on some tokens and its gradients, as NumPy arrays: for those who want to look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array
from ..errors import ParameterError
from ..model import Model
from ..models.export import checkpoint_tensors
from ..ops.weights import segments_of
from .backward import gradient_name
from .batch import Batch
from .passes import Passes, rope_tables
from .step import LOSS, training_step

__all__ = ["gradients"]


def gradients(
    model: Model, token_ids: np.ndarray[Any, Any] | Sequence[Sequence[int]]
) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
    """(loss, gradients) of a model. The model is not changed.

    token_ids: int [B, T+1], B texts of one length; the loss is the mean cross entropy of the B*T tokens that follow
    another. The gradients are by tensor name and in the tensors' shapes as the checkpoint has them, float32. A head
    that is tied to the embedding has no gradient of its own: the two are added up. Raises ParameterError for token ids
    that do not fit the model, and for quantised weights, which have no gradients.
    """
    ids = _token_ids(model, token_ids)
    runner, backend, config = model.engine.runner, model.backend, model.config
    names = config.weight_shapes()
    weights = {name: runner.values[name] for name in names}
    if packed := next((name for name, array in weights.items() if segments_of(array) is not None), None):
        raise ParameterError(f"{packed} is quantised; gradients are of plain weights")
    batch, f32 = Batch.of_rows(ids), DTYPES["f32"]
    tables = rope_tables(config, ids.shape[1] - 1)
    plan = training_step(config, batch.rows, names)
    into: dict[int, Array] = {}  # by the weight's array: a tied head adds to the embedding's
    parts = {name: runner.values[name] for name in config.lora_parts()}
    values: dict[str, Array] = {LOSS: backend.zeros((1,), f32), **parts}
    for name, array in weights.items():
        values[gradient_name(name)] = into.setdefault(id(array), backend.zeros(names[name], f32))
    for name in plan.arrays:
        if name not in values:  # of a value that is sliced
            values[name] = backend.zeros((batch.rows, config.hidden_size), backend.dtype)
    if tables is not None:
        values |= {"rope.cos": backend.upload(tables.cos), "rope.sin": backend.upload(tables.sin)}
    passes = Passes(backend, lambda rows: (plan.nodes, {**weights, **values}), tables)
    passes.run(batch)
    loss = float(backend.download(values[LOSS])[0])
    own = {id(weights[name]): name for name in reversed(names)}  # the first of the names of an array
    found = {name: backend.download(values[gradient_name(name)]) for name in own.values()}
    passes.close()
    return loss, {name: np.ascontiguousarray(array) for name, array in checkpoint_tensors(config, found)}


def _token_ids(model: Model, token_ids: Any) -> np.ndarray[Any, Any]:
    ids = np.asarray(token_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ParameterError(f"token_ids is {ids.dtype} {list(ids.shape)}; it must be int [B, T+1] with T of 1 or more")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ParameterError(f"token_ids has {ids.min()} to {ids.max()}; ids are 0 to {model.config.vocab_size - 1}")
    if not model.config.ropes and ids.shape[1] - 1 > model.config.context:
        raise ParameterError(
            f"token_ids has T = {ids.shape[1] - 1}; the model learned {model.config.context} positions"
        )
    return ids
