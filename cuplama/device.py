"""Where a model runs: the backend that was asked for or that works, and whether the model fits there."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import one_of
from .backends import Backend
from .backends.cuda.driver import cuda_available
from .backends.cuda.unpacking import largest_slice
from .dtypes import DTYPES, dtype_name
from .engine import memory
from .engine.engine import MAX_RUNNING
from .engine.kv_cache import KV_CACHE_DTYPES, PAGE, cache_dtype
from .errors import DeviceError, ParameterError
from .models.config import ModelConfig
from .ops.attention import HEAD_DIMS
from .quant.format import E4M3
from .quant.stored import Stored
from .quant.weight import Weight

__all__ = [
    "ACTIVATIONS",
    "DEVICES",
    "Room",
    "Setup",
    "check_head_dim",
    "open_backend",
    "stored_dtype",
    "weight_bytes",
]

DEVICES = ("auto", "cuda", "numpy")
ACTIVATIONS = ("auto", "fp8")
# A cache on NumPy that may be as large as there is room for: as many sequences of full length, in at most this share of
# the host memory that is free. Memory of pages that are never used is never touched.
_HOST_CONTEXTS = 8
_HOST_SHARE = 0.25
_log = logging.getLogger("cuplama")


@dataclass(frozen=True)
class Setup:
    """How a model runs.

    device: one of ``DEVICES``; dtype: a dtype's short name, or "auto": the checkpoint's on CUDA, float32 on NumPy;
    context: tokens of a sequence; tokens: of the KV cache, all sequences together, None for as many as there is room
    for; kv_cache_dtype: one of ``KV_CACHE_DTYPES``; activations: one of ``ACTIVATIONS``; deterministic, prefix_cache,
    max_waiting: as of ``load``; max_running: sequences that run at a time.
    """

    device: str
    dtype: str
    context: int
    tokens: int | None
    kv_cache_dtype: str = "auto"
    activations: str = "auto"
    deterministic: bool = False
    max_running: int = MAX_RUNNING
    max_waiting: int | None = None
    prefix_cache: bool = True


@dataclass(frozen=True)
class Room:
    """What there is room for beside a model: tokens, of its cache; slots, for states of sequences."""

    tokens: int
    slots: int


def open_backend(setup: Setup, config: ModelConfig, weights: Mapping[str, Weight]) -> tuple[Backend, Room]:
    """A backend with room for one model, and for what else.

    Where activations "fp8" change nothing, a warning says so.

    Raises ParameterError for an unknown device, and DeviceError, with the numbers, where weights, cache and workspace
    do not fit or a head_dim is not in the kernels.
    """
    one_of("device", setup.device, DEVICES)
    one_of("activations", setup.activations, ACTIVATIONS)
    one_of("kv_cache_dtype", setup.kv_cache_dtype, KV_CACHE_DTYPES)
    if setup.deterministic:
        _check_deterministic(setup, config)
    if setup.activations != "auto" and not _has_floats(weights):
        _log.warning("activations fp8 changes nothing: the model has no weights in fp8 (e4m3)")
        setup = replace(setup, activations="auto")
    if setup.device != "numpy":
        works, reason = cuda_available()
        if works:
            return _open_cuda(setup, config, weights)
        if setup.device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}")
        if not setup.deterministic:
            _log.warning("running on NumPy: %s", reason)
    if setup.deterministic:
        raise DeviceError(
            "deterministic=True needs a GPU: NumPy's sums depend on how many tokens are computed together"
            + ("" if setup.device == "numpy" else f", and device cuda cannot be used: {reason}")
        )
    if setup.activations != "auto":
        _log.warning("activations fp8 changes nothing: NumPy computes in float32")
    return _open_numpy(setup, config, weights)


def _check_deterministic(setup: Setup, config: ModelConfig) -> None:
    """Raise ParameterError for what makes a token's keys depend on more than the tokens before it."""
    if setup.activations != "auto":
        raise ParameterError(
            f"activations = '{setup.activations}' rounds in passes of more than 64 rows and in no others;"
            " with deterministic=True it must be auto"
        )
    for rope in config.ropes.values():
        if rope.type == "dynamic" and setup.context > rope.context:
            raise ParameterError(
                f"context = {setup.context}: beyond {rope.context} tokens the model's rotations (dynamic) depend on the"
                f" length of the text; with deterministic=True context must be at most {rope.context}"
            )


def weight_bytes(weights: Iterable[Weight], dtype: np.dtype[Any]) -> int:
    """Bytes of all weights where plain ones have that dtype, a tied head counted once."""
    return sum(w.device_bytes(dtype) for w in {w.source: w for w in weights}.values())


def _row_bytes(weights: Mapping[str, Weight]) -> int:
    """Bytes of the codes of packed matrices by rows, with a scale for each row or 128 columns of it."""
    unique = {w.source: w for w in weights.values() if w.packed and w.name != "embed_tokens"}
    return sum(w.elements + w.elements // 32 for w in unique.values())


def check_head_dim(config: ModelConfig) -> None:
    """Raise DeviceError for a head_dim that is not in the CUDA kernels."""
    if missing := sorted(config.head_dims - {*HEAD_DIMS}):
        raise DeviceError(
            f"head_dim = {missing[0]}: the CUDA kernels take multiples of 8 up to 256, and of 16 up to 512;"
            " --device numpy takes any"
        )


def _has_floats(weights: Mapping[str, Weight]) -> bool:
    """Whether any weight is of 8-bit floats."""
    parts = (p for w in weights.values() for p in w.parts if isinstance(p, Stored))
    return any(p.format.packing is not None and p.format.packing.code == E4M3 for p in parts)


def stored_dtype(config: ModelConfig, weights: Mapping[str, Weight]) -> str:
    """The short name of the dtype that "auto" stands for on a GPU: that of the embedding's numbers, or what the config
    says where they are quantised."""
    table = weights["embed_tokens"]
    return config.stored if table.packed else dtype_name(table.dtype)


def _open_cuda(setup: Setup, config: ModelConfig, weights: Mapping[str, Weight]) -> tuple[Backend, Room]:
    from .backends.cuda.backend import CudaBackend

    check_head_dim(config)
    chosen = stored_dtype(config, weights) if setup.dtype == "auto" else setup.dtype
    backend = CudaBackend(chosen, activations=setup.activations, deterministic=setup.deterministic)
    size, cache = weight_bytes(weights.values(), backend.dtype), cache_dtype(setup.kv_cache_dtype, backend.dtype)
    unpacked = largest_slice({w.name: w.shape for w in weights.values() if w.packed}, backend.dtype.itemsize)

    codes = _row_bytes(weights) if backend.activations == "fp8" else 0

    def fit(free: int) -> memory.MemoryPlan:
        """The plan, with the codes of the weights by rows beside them where there is room."""
        context, tokens, chunks, limits = setup.context, setup.tokens, backend.prefill_chunks, backend.gpu.limits
        more = (unpacked, cache, setup.max_running)
        for kept in dict.fromkeys((codes, 0)):
            backend.keeps_codes = kept > 0
            found = memory.fit(config, size + kept, backend.dtype, context, tokens, chunks, free, limits, *more)
            backend.prefill_chunk, plan = found
            if plan.total <= free:
                break
        return plan

    if setup.tokens is None:
        gc.collect()  # as below
    free = backend.free_memory()
    plan = fit(free)
    if plan.total > free:
        gc.collect()  # a model that was dropped without close() holds its memory until it is found
        free = backend.free_memory()
        plan = fit(free)
    try:
        memory.check(plan, free, backend.gpu.name)
    except DeviceError:
        backend.close()
        raise
    return backend, Room(plan.tokens, plan.slots)


def _open_numpy(setup: Setup, config: ModelConfig, weights: Mapping[str, Weight]) -> tuple[Backend, Room]:
    from .backends.numpy import NumPyBackend

    chosen = "f32" if setup.dtype == "auto" else setup.dtype
    elements = sum(w.elements for w in {w.source: w for w in weights.values()}.values())
    size, free = elements * DTYPES[chosen].itemsize, _free_memory()
    fits = size < 0.7 * free
    if not fits:
        _log.warning(
            "the weights take %.1f GB as %s and do not fit; they stay in the file, which is slow", size / 1e9, chosen
        )
    backend = NumPyBackend(chosen, convert=fits)
    kept = cache_dtype(setup.kv_cache_dtype, backend.dtype)
    tokens = setup.tokens
    if tokens is None:
        tokens = _host_tokens(setup.context, memory.cache_bytes(config, kept, PAGE), free)
    # cos and sin, and as much again while they are made
    tables = 8 * setup.context * sum(rope.dim for rope in config.ropes.values())
    state = memory.state_bytes(config, backend.dtype)
    need = memory.cache_bytes(config, kept, tokens) + tables + 2 * state
    slots = memory.most_slots(setup.max_running, state, free - need) if state else 1
    need += (slots - 1) * state
    if need > free:  # before the system runs out of memory
        raise DeviceError(
            f"a cache of {tokens} tokens takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free;"
            " ask for a shorter context"
        )
    return backend, Room(tokens, slots)


def _host_tokens(context: int, page: int, free: float) -> int:
    """Tokens of a cache on NumPy that may be as large as there is room for. page: bytes of one page; free: bytes."""
    room = _HOST_SHARE * min(free, 2.0**62) // page * PAGE
    return max(context, int(min(_HOST_CONTEXTS * context, room)))


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
