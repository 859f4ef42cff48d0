"""Where a model runs: the backend that was asked for or that works, and whether the model fits there."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import one_of
from .backends import Backend
from .backends.cuda.driver import cuda_available
from .backends.cuda.unpacking import largest_slice
from .dtypes import DTYPES, dtype_name
from .engine import memory
from .engine.kv_cache import cache_dtype
from .errors import DeviceError
from .models.config import ModelConfig
from .ops.attention import HEAD_DIMS
from .quant.weight import Weight

__all__ = ["DEVICES", "open_backend", "stored_dtype"]

DEVICES = ("auto", "cuda", "numpy")
_log = logging.getLogger("cuplama")


def open_backend(
    device: str,
    dtype: str,
    config: ModelConfig,
    weights: Mapping[str, Weight],
    context: int,
    tokens: int,
    kv_cache_dtype: str = "auto",
) -> Backend:
    """A backend with room for one model. device: one of ``DEVICES``; dtype: a dtype's short name, or "auto".

    context: tokens of a sequence; tokens: of the KV cache, all sequences together; kv_cache_dtype: one of
    ``KV_CACHE_DTYPES``. "auto" is the checkpoint's dtype on
    CUDA and float32 on NumPy. Raises ParameterError for an unknown device, and DeviceError, with the numbers, where
    weights, cache and workspace do not fit or a head_dim is not in the kernels.
    """
    one_of("device", device, DEVICES)
    if device != "numpy":
        works, reason = cuda_available()
        if works:
            return _open_cuda(dtype, config, weights, context, tokens, kv_cache_dtype)
        if device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}")
        _log.warning("running on NumPy: %s", reason)
    return _open_numpy(dtype, config, weights, tokens, kv_cache_dtype)


def _bytes(weights: Mapping[str, Weight], dtype: np.dtype[Any]) -> int:
    """Bytes of all weights where plain ones have that dtype, a tied head counted once."""
    return sum(w.device_bytes(dtype) for w in {w.source: w for w in weights.values()}.values())


def stored_dtype(config: ModelConfig, weights: Mapping[str, Weight]) -> str:
    """The short name of the dtype that "auto" stands for on a GPU: that of the embedding's numbers, or what the config
    says where they are quantised."""
    table = weights["embed_tokens"]
    return config.stored if table.packed else dtype_name(table.dtype)


def _open_cuda(
    dtype: str, config: ModelConfig, weights: Mapping[str, Weight], context: int, tokens: int, kv_cache_dtype: str
) -> Backend:
    from .backends.cuda.backend import CudaBackend

    if config.head_dim not in HEAD_DIMS:
        raise DeviceError(
            f"head_dim = {config.head_dim}: the CUDA kernels take multiples of 8 up to {HEAD_DIMS[-1]};"
            " --device numpy takes any"
        )
    backend = CudaBackend(stored_dtype(config, weights) if dtype == "auto" else dtype)
    size, cache = _bytes(weights, backend.dtype), cache_dtype(kv_cache_dtype, backend.dtype)
    unpacked = largest_slice({w.name: w.shape for w in weights.values() if w.packed}, backend.dtype.itemsize)

    def fit(free: int) -> tuple[int, memory.MemoryPlan]:
        chunks, limits = backend.prefill_chunks, backend.gpu.limits
        return memory.fit(config, size, backend.dtype, context, tokens, chunks, free, limits, unpacked, cache)

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


def _open_numpy(
    dtype: str, config: ModelConfig, weights: Mapping[str, Weight], tokens: int, kv_cache_dtype: str
) -> Backend:
    from .backends.numpy import NumPyBackend

    chosen = "f32" if dtype == "auto" else dtype
    elements = sum(w.elements for w in {w.source: w for w in weights.values()}.values())
    size, free = elements * DTYPES[chosen].itemsize, _free_memory()
    fits = size < 0.7 * free
    if not fits:
        _log.warning(
            "the weights take %.1f GB as %s and do not fit; they stay in the file, which is slow", size / 1e9, chosen
        )
    backend = NumPyBackend(chosen, convert=fits)
    # cos and sin, and as much again while they are made
    tables = 8 * tokens * sum(rope.dim for rope in config.ropes.values())
    need = memory.cache_bytes(config, cache_dtype(kv_cache_dtype, backend.dtype), tokens) + tables
    if need > free:  # before the system runs out of memory
        raise DeviceError(
            f"a cache of {tokens} tokens takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free;"
            " ask for a shorter context"
        )
    return backend


def _free_memory(root: Path = Path("/")) -> float:
    """Bytes of host memory that can be had, or infinity where the system does not say.

    A container's limit counts as the machine's. root: where the system's files are.
    """
    return min(_machine_memory(root), *_group_memory(root))


def _machine_memory(root: Path) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError):  # Linux: a file cache can be given up, "free" is too low
        return 1024.0 * _numbers(root / "proc/meminfo")["MemAvailable:"]
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


# Of version 2 and 1 of Linux's control groups: the controllers as /proc/self/cgroup names them, the folder under
# /sys/fs/cgroup, the files of the limit and of what is used, and a prefix of names in memory.stat.
_GROUPS = (
    ("", ".", "memory.max", "memory.current", ""),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def _group_memory(root: Path) -> list[float]:
    """Bytes that the process's control group, and each above it, leaves free; infinity among them.

    Inside a container the group is often seen as the root of the tree, or under a name that is not there.
    """
    found = [float("inf")]
    lines = []
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for controllers, folder, limit, used, prefix in _GROUPS:
        top = root / "sys/fs/cgroup" / folder
        for name in (name for _, named, name in lines if controllers in named.split(",")):
            group = top / name.strip("/")
            inside = [group, *group.parents] if ".." not in group.parts else []
            for place in {top, *(p for p in inside if p.is_relative_to(top))}:
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
                    stat = _numbers(place / "memory.stat")
                    cache = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                    taken = int((place / used).read_text()) - cache
                    found.append(max(0.0, float(int((place / limit).read_text()) - taken)))
    return found


def _numbers(path: Path) -> dict[str, int]:
    """Name -> number of a file of the system that holds such lines."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}
