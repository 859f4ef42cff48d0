"""How much memory a training takes, worked out before anything is allocated, by the walk that plans inference too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, dtype_name
from ..engine.batch import abstract_tables
from ..engine.memory import FIXED, peak_bytes
from ..errors import DeviceError
from ..models.config import ModelConfig
from ..ops.abstract import AbstractArray, abstract
from ..ops.launch import Device
from .muon import layer_matrices, matrix_nodes
from .settings import TrainingSettings
from .step import LOSS, StepPlan, Teacher, array_shapes, teacher_value, training_step

__all__ = ["TrainingMemory", "abstract_values", "check", "plan"]

_POOL = 1.1  # What the pool of a step takes for each byte alive at the worst moment: free blocks rarely fit exactly.
_DOCUMENTS = 1024  # that a batch is taken to have; a number for each is all that they add


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. weights: that are trained, with gradients, masters and moments; frozen: the others; activations: at the
    worst moment of a pass, and what the update takes; dtype: of the model."""

    weights: int
    frozen: int
    activations: int
    dtype: str

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.frozen + math.ceil(_POOL * self.activations) + FIXED

    def describe(self) -> str:
        """Sum and parts in one line, in GB (10^9 bytes)."""
        frozen = f" + frozen weights {self.frozen / 1e9:.2f}" if self.frozen else ""
        return (
            f"{self.total / 1e9:.2f} GB = weights, gradients and moments {self.weights / 1e9:.2f}{frozen}"
            f" + activations {self.activations / 1e9:.2f} ({self.dtype})"
        )


def plan(
    config: ModelConfig,
    settings: TrainingSettings,
    trained: Sequence[str],
    frozen: int,
    context: int,
    T: np.dtype[Any],
    device: Device,
    teachers: Sequence[ModelConfig] = (),
) -> TrainingMemory:
    """What a step on ``settings.batch_size`` rows of ``context`` tokens takes.

    trained: canonical names of weights, a tied head by both of its names; frozen: bytes of the weights that are not,
    teachers' among them.
    """
    shapes, rows, f32 = config.weight_shapes(), settings.batch_size * context, DTYPES["f32"]
    guides = [Teacher(teacher, i) for i, teacher in enumerate(teachers)]
    share = settings.teacher_share if guides else 0.0
    step = training_step(config, rows, trained, settings.recompute, settings.dropout, guides, share)
    values: dict[str, Array | None] = {**abstract_values(config, step, T, context, _DOCUMENTS)}
    for guide in guides:
        found = {name: abstract(shape, T) for name, shape in guide.config.weight_shapes().items()}
        found |= abstract_tables(guide.config, context)
        values |= {teacher_value(guide.number, name): array for name, array in found.items()}
    own = [name for name in trained if not (config.tied and name == "lm_head")]
    per_element = 4 * 4 + (0 if f32 == T else T.itemsize)  # gradient, master and two moments, and the weight itself
    return TrainingMemory(
        weights=per_element * sum(math.prod(shapes[name]) for name in own),
        frozen=frozen,
        activations=peak_bytes(step.nodes, values, T, device) + _update_bytes(config, settings, T, device),
        dtype=dtype_name(T),
    )


def _update_bytes(config: ModelConfig, settings: TrainingSettings, T: np.dtype[Any], device: Device) -> int:
    """What the update takes besides the weights: Muon's products with its largest matrix, in a pool of their own."""
    if settings.optimizer != "muon":
        return 0
    f32, found = DTYPES["f32"], [0]
    numbers = {"norm_squared": abstract((1,), f32), "schedule": abstract((3,), f32)}
    for shape in {shape for shapes in layer_matrices(config).values() for shape in shapes}:
        arrays = {f"matrix.{x}": abstract(shape, T if x == "p" else f32) for x in ("p", "g", "master")}
        nodes = matrix_nodes("matrix", *shape, settings.weight_decay)
        found.append(peak_bytes(nodes, {**numbers, **arrays}, T, device))
    return max(found)


def abstract_values(
    config: ModelConfig, step: StepPlan, T: np.dtype[Any], context: int, documents: int
) -> dict[str, AbstractArray]:
    """Descriptions of everything that a step reads, by name. context: of the rotation tables; documents: of a batch."""
    shapes, rows, i32, f32 = config.weight_shapes(), step.rows, DTYPES["i32"], DTYPES["f32"]
    found = {name: abstract(shape, T) for name, shape in shapes.items()}
    found |= {name: abstract(part.shape, part.dtype) for name, part in config.lora_parts().items()}
    found |= {name: abstract(*array) for name, array in array_shapes(config, step, T).items()}
    found |= abstract_tables(config, context)
    names = ("input_ids", "input_ids.order", "positions", "positions.order", "rope.rows", "targets")
    found |= {name: abstract((rows,), i32) for name in names}
    return found | {
        "weights": abstract((rows,), f32),
        "cu_seqlens": abstract((documents + 1,), i32),
        "dropout.seed": abstract((2,), DTYPES["u32"]),
        LOSS: abstract((1,), f32),
    }


def check(need: TrainingMemory, free: int, device: str) -> None:
    """Raise DeviceError, with the numbers and what would help, if a training does not fit in ``free`` bytes."""
    if need.total <= free:
        return
    rest = need.total - math.ceil(_POOL * need.activations)
    help_ = (
        "a smaller --batch-size with --accumulate, or --recompute layers, needs less"
        if rest < free
        else "--lora trains with less"
    )
    raise DeviceError(f"the training needs {need.describe()}, but {device} has {free / 1e9:.2f} GB free; {help_}")
