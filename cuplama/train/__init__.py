"""Training: a model's node list differentiated, an optimizer, data and a loop."""

from .batch import Batch
from .gradients import gradients
from .settings import TrainingSettings
from .trainer import Trainer

__all__ = ["Batch", "Trainer", "TrainingSettings", "gradients"]
