"""Training: a model's node list differentiated, an optimizer, data and a loop."""

from .gradients import gradients

__all__ = ["gradients"]
