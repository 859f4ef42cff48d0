"""A trainer from the name of a model, for those who write the loop themselves."""

from __future__ import annotations

import os

from ..hub import BUNDLED, find_model
from .opening import open_training_backend
from .origin import trained_model
from .settings import TrainingSettings
from .trainer import Trainer

__all__ = ["open_trainer"]


def open_trainer(model: str | os.PathLike[str] | None, settings: TrainingSettings, *, offline: bool = False) -> Trainer:
    """A trainer of a model: of its weights, or with ``settings.lora`` of adapters.

    model: a folder or hub id, None for the bundled one; offline: never ask the hub. Data, learning rates and the number
    of steps are the caller's: ``Trainer.step`` takes batches and a learning rate, ``Trainer.save`` writes the model,
    and ``Trainer.close``, or the end of a ``with`` block, gives the device back.

    Raises ParameterError, ConfigError, CheckpointError, TokenizerError or DeviceError, each naming the culprit.
    """
    name = BUNDLED if model is None else os.fspath(model)
    origin = trained_model(find_model(model, offline), name, settings)
    context = settings.row_length(origin.config.context, not origin.config.ropes)
    backend = open_training_backend(settings, origin.config, origin.weights, context)
    try:
        trainer = Trainer(origin.config, origin.weights, settings, backend, context, owns_backend=True)
    except BaseException:
        backend.close()
        raise
    trainer.files = origin.files
    return trainer
