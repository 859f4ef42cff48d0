"""All ops by name. One module per stem; the kernels of ``ops/<stem>.py`` are in ``cuda_src/<stem>.cu``."""

from __future__ import annotations

from collections.abc import Mapping

from . import activation, attention, embedding, fused, kv_cache, linear, norm, residual, rope, sampling
from . import advance as decode
from .op import Op

__all__ = ["OPS"]

_MODULES = (embedding, norm, linear, rope, kv_cache, attention, activation, residual, sampling, fused, decode)

OPS: Mapping[str, Op] = {op.name: op for module in _MODULES for op in vars(module).values() if isinstance(op, Op)}
