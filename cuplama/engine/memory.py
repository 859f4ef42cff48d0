"""How much GPU memory a model needs, worked out before anything is allocated.

Weights and cache are products of sizes. The workspace is found by walking the node list of the largest prefill pass
with array descriptions instead of arrays: what is alive at each node, at its peak. Captured graphs of large batches
come on top; where they find no room, older ones are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, dtype_name
from ..errors import DeviceError
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import decoder
from ..models.rope import table_rows
from ..ops.abstract import infer
from ..ops.launch import Device
from ..ops.node import Node, dying
from .batch import abstract_values, input_shapes
from .graphs import KEPT_CHUNKS, max_logits, padded_rows
from .kv_cache import PAGE, pages_for

__all__ = ["FIXED", "POOL", "MemoryPlan", "cache_bytes", "check", "fit", "plan", "workspace_bytes"]

# cuBLAS's workspace, compiled kernels, and what the pool loses to rounding. CUDA's own context is in no plan: it is
# taken before free memory is read.
FIXED = 160 << 20
# What a pool takes for each byte that is alive at the worst moment: its free blocks do not always fit together. CuPy's
# rules, simulated for the presets, give 1.3 to 1.55 (tests/engine/test_memory.py).
POOL = 1.6


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a model takes on the GPU. tokens: that the cache holds; dtype: of weights, cache and activations."""

    weights: int
    cache: int
    workspace: int
    tokens: int
    dtype: str

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.cache + self.workspace

    def parts(self) -> tuple[tuple[str, int], ...]:
        """What and how much, in the order of allocation."""
        return (
            (f"weights ({self.dtype})", self.weights),
            (f"cache ({self.tokens} tokens)", self.cache),
            ("workspace", self.workspace),
        )

    def describe(self) -> str:
        """Sum and parts in one line, in GB (10^9 bytes)."""
        return f"{_gb(self.total)} = " + " + ".join(f"{name} {_gb(size)}" for name, size in self.parts())


def cache_bytes(config: ModelConfig, dtype: np.dtype[Any], tokens: int) -> int:
    """Keys and values of all layers for that many tokens, in whole pages."""
    return 2 * config.num_layers * pages_for(tokens) * PAGE * config.num_kv_heads * config.head_dim * dtype.itemsize


def workspace_bytes(config: ModelConfig, dtype: np.dtype[Any], tokens: int, device: Device, logit_rows: int = 1) -> int:
    """The most that activations and scratch take at one time in a pass over ``tokens`` tokens of one sequence."""
    pages = pages_for(tokens)
    values = abstract_values(config, dtype, input_shapes(tokens, 1, pages, logit_rows), pages, tokens)
    graph = decoder(config)
    nodes = fuse([*graph.body, *graph.selected_rows()], PREFILL_RULES)
    return _peak(nodes, {**values}, dtype, device)


def _peak(nodes: Sequence[Node], values: dict[str, Array | None], T: np.dtype[Any], device: Device) -> int:
    """Bytes alive at the worst moment, beyond the given values."""
    alive, peak = dict[str, int](), 0
    for (node, call), dead in zip(infer(nodes, values, T), dying(nodes), strict=True):
        signature = call.op.signature
        made = (n for n, spec in zip(node.outs, signature.outs, strict=True) if spec.name not in signature.in_place)
        alive |= {name: values[name].nbytes for name in made}  # type: ignore[union-attr]
        scratch = 0
        if call.op.kernels is not None and not call.op.matmul:  # a product over many rows is cuBLAS's
            buffers = call.op.kernels(call, device).scratch.values()
            scratch = sum(math.prod(shape) * DTYPES[dtype].itemsize for shape, dtype in buffers)
        peak = max(peak, sum(alive.values()) + scratch)
        for name in dead:
            alive.pop(name, None)
    return peak


def plan(
    config: ModelConfig,
    weights: int,
    dtype: np.dtype[Any],
    context: int,
    tokens: int,
    chunk: int,
    device: Device,
    unpacked: int = 0,
) -> MemoryPlan:
    """What a model takes whose weights have that many bytes, and whose activations and cache have that dtype.

    context: tokens of a sequence; tokens: of the whole cache; chunk: the most tokens of one prefill pass; unpacked:
    bytes of scratch for the numbers of quantised weights, which all passes share.
    """
    tables = sum(4 * rope.dim * table_rows(rope, context) for rope in config.ropes.values())
    # Logits, penalised logits and the sampler's scratch; or those of all tokens, where they are asked for.
    logits = 4 * config.vocab_size * max(4, min(max_logits(config.vocab_size), chunk, tokens))
    # What captured passes hold, and one that is not captured.
    work = (KEPT_CHUNKS + 1) * workspace_bytes(config, dtype, padded_rows(min(chunk, max(1, tokens))), device)
    padding = cache_bytes(config, dtype, PAGE)
    return MemoryPlan(
        weights=weights,
        cache=cache_bytes(config, dtype, tokens),
        workspace=math.ceil(POOL * work) + tables + logits + padding + unpacked + FIXED,
        tokens=tokens,
        dtype=dtype_name(dtype),
    )


def fit(
    config: ModelConfig,
    weights: int,
    dtype: np.dtype[Any],
    context: int,
    tokens: int,
    chunks: Sequence[int],
    free: int,
    device: Device,
    unpacked: int = 0,
) -> tuple[int, MemoryPlan]:
    """The first of ``chunks``, largest first, whose plan fits in ``free`` bytes, or the last; and its plan."""
    for chunk in chunks:
        found = plan(config, weights, dtype, context, tokens, chunk, device, unpacked)
        if found.total <= free:
            break
    return chunk, found


def check(need: MemoryPlan, free: int, device: str) -> None:
    """Raise DeviceError, with the numbers and what would help, if the plan does not fit in ``free`` bytes."""
    if need.total <= free:
        return
    bare = replace(need, cache=0).total
    room = (free - bare) * need.tokens // need.cache // PAGE * PAGE if bare < free else 0
    if room:
        help_ = f"--context {room} would fit"
    elif need.dtype == "f32" and bare - need.weights // 2 < free:
        help_ = "--dtype float16 would halve it"
    else:
        help_ = "no --context is short enough; a smaller model or a larger GPU is needed"
    raise DeviceError(f"the model needs {need.describe()}, but {device} has {_gb(free)} free; {help_}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
