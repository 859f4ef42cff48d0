"""The device that a training runs on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arguments import one_of
from ..backends import Backend
from ..backends.cuda.driver import cuda_available
from ..device import DEVICES, check_head_dim, weight_bytes
from ..errors import DeviceError
from ..models.config import ModelConfig
from ..quant.weight import Weight
from . import memory
from .settings import TrainingSettings
from .trainer import GuidingModel

__all__ = ["open_training_backend"]

_log = logging.getLogger("cuplama")
_NAMES = {"float32": "f32", "bfloat16": "bf16"}


def open_training_backend(
    settings: TrainingSettings,
    config: ModelConfig,
    weights: Mapping[str, Weight | np.ndarray[Any, Any]],
    context: int,
    teachers: Sequence[GuidingModel] = (),
) -> Backend:
    """A backend with room for a training. weights, teachers: as of a ``Trainer``; context: tokens of a row.

    Raises DeviceError, with the numbers, where memory is short, and for what the kernels cannot do.
    """
    one_of("device", settings.device, DEVICES)
    if settings.device != "numpy":
        works, reason = cuda_available()
        if works:
            return _open_cuda(settings, config, weights, context, teachers)
        if settings.device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}")
        _log.warning("training on NumPy: %s", reason)
    from ..backends.numpy import NumPyBackend

    return NumPyBackend(_NAMES.get(settings.dtype, "f32"))


def _open_cuda(
    settings: TrainingSettings,
    config: ModelConfig,
    weights: Mapping[str, Weight | np.ndarray[Any, Any]],
    context: int,
    teachers: Sequence[GuidingModel],
) -> Backend:
    from ..backends.cuda.backend import CudaBackend
    from ..backends.cuda.gpu import Gpu

    check_head_dim(config)
    gpu = Gpu()
    has_bf16 = gpu.limits.arch >= 80
    if settings.dtype == "bfloat16" and not has_bf16:
        raise DeviceError(f"{gpu.name} (sm_{gpu.limits.arch}) has no bfloat16; --dtype float32 trains on it")
    backend = CudaBackend(_NAMES.get(settings.dtype, "bf16" if has_bf16 else "f32"), gpu=gpu)
    try:
        adapters = config.adapter_weights()
        loaded = [w for w in weights.values() if isinstance(w, Weight)] if adapters else []
        frozen = sum(weight_bytes(group, backend.dtype) for group in (loaded, *(t.weights.values() for t in teachers)))
        # The backward pass unpacks a quantised matrix as a whole, all into one place.
        frozen += max((math.prod(w.shape) * backend.dtype.itemsize for w in loaded if w.packed), default=0)
        trained = adapters or list(config.weight_shapes())
        guides = [teacher.config for teacher in teachers]
        need = memory.plan(config, settings, trained, frozen, context, backend.dtype, backend.gpu.limits, guides)
        memory.check(need, backend.free_memory(), backend.gpu.name)
    except BaseException:
        backend.close()
        raise
    return backend
