"""Where a model runs: the backend that was asked for or that works, and whether the model fits there."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from .backends import Backend
from .backends.cuda.driver import cuda_available
from .dtypes import DTYPES, dtype_name
from .engine import memory
from .errors import DeviceError, ParameterError
from .models.config import ModelConfig
from .ops.attention import HEAD_DIMS
from .quant.weight import Weight

__all__ = ["DEVICES", "open_backend"]

DEVICES = ("auto", "cuda", "numpy")
_log = logging.getLogger("cuplama")


def open_backend(
    device: str, dtype: str, config: ModelConfig, weights: Mapping[str, Weight], context: int, tokens: int
) -> Backend:
    """A backend with room for one model. device: one of ``DEVICES``; dtype: a dtype's short name, or "auto".

    context: tokens of a sequence; tokens: of the KV cache, all sequences together. "auto" is the checkpoint's dtype on
    CUDA and float32 on NumPy. Raises ParameterError for an unknown device, and DeviceError, with the numbers, where
    weights, cache and workspace do not fit or a head_dim is not in the kernels.
    """
    if device not in DEVICES:
        raise ParameterError(f"device = {device!r} is not supported; supported: {', '.join(DEVICES)}")
    if device != "numpy":
        works, reason = cuda_available()
        if works:
            return _open_cuda(dtype, config, weights, context, tokens)
        if device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}")
        _log.warning("running on NumPy: %s", reason)
    return _open_numpy(dtype, config, weights, tokens)


def _elements(weights: Mapping[str, Weight]) -> int:
    """Elements of all weights, a tied head counted once."""
    return sum(w.nbytes // w.dtype.itemsize for w in {w.source: w for w in weights.values()}.values())


def _open_cuda(dtype: str, config: ModelConfig, weights: Mapping[str, Weight], context: int, tokens: int) -> Backend:
    from .backends.cuda.backend import CudaBackend

    if config.head_dim not in HEAD_DIMS:
        raise DeviceError(
            f"head_dim = {config.head_dim}: the CUDA kernels take multiples of 8 up to {HEAD_DIMS[-1]};"
            " --device numpy takes any"
        )
    backend = CudaBackend(dtype_name(weights["embed_tokens"].dtype) if dtype == "auto" else dtype)
    elements = _elements(weights)

    def fit(free: int) -> tuple[int, memory.MemoryPlan]:
        chunks, limits = backend.prefill_chunks, backend.gpu.limits
        return memory.fit(config, elements, backend.dtype, context, tokens, chunks, free, limits)

    free = backend.free_memory()
    backend.prefill_chunk, plan = fit(free)
    if plan.total > free:
        gc.collect()  # a model that was dropped without close() holds its memory until it is found
        free = backend.free_memory()
        backend.prefill_chunk, plan = fit(free)
    try:
        memory.check(plan, free, backend.gpu.name)
    except DeviceError:
        backend.close()
        raise
    return backend


def _open_numpy(dtype: str, config: ModelConfig, weights: Mapping[str, Weight], tokens: int) -> Backend:
    from .backends.numpy import NumPyBackend

    chosen = "f32" if dtype == "auto" else dtype
    size, free = _elements(weights) * DTYPES[chosen].itemsize, _free_memory()
    fits = size < 0.7 * free
    if not fits:
        _log.warning(
            "the weights take %.1f GB as %s and do not fit; they stay in the file, which is slow", size / 1e9, chosen
        )
    backend = NumPyBackend(chosen, convert=fits)
    # cos and sin, and as much again while they are made
    tables = 8 * tokens * sum(rope.dim for rope in config.ropes.values())
    need = memory.cache_bytes(config, backend.dtype, tokens) + tables
    if need > free:  # before the system runs out of memory
        raise DeviceError(
            f"a cache of {tokens} tokens takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free;"
            " ask for a shorter context"
        )
    return backend


def _free_memory() -> float:
    """Bytes of host memory that can be had, or infinity where the system does not say."""
    with contextlib.suppress(OSError, ValueError):  # Linux: the file cache can be given up, so "free" alone is too low
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")
