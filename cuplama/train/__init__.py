"""Training: a model's node list differentiated, an optimizer, data and a loop.

A name is imported when it is first used: the command line needs only the settings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .model_gradients import gradients
    from .session import open_trainer
    from .settings import TrainingSettings
    from .trainer import Trainer

__all__ = ["Batch", "Trainer", "TrainingSettings", "gradients", "open_trainer"]

_MODULES = {
    "Batch": "batch",
    "Trainer": "trainer",
    "TrainingSettings": "settings",
    "gradients": "model_gradients",
    "open_trainer": "session",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cuplama.train' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
