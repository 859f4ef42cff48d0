"""How much GPU memory a model needs, worked out before anything is allocated.

Weights and cache are products of sizes. The workspace is found by walking the node lists of the largest prefill pass
and of the largest decode step with array descriptions instead of arrays: what is alive at each node, at its peak.
Captured graphs of other sizes come on top; where they find no room, older ones are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, dtype_name
from ..errors import DeviceError
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import decoder
from ..models.rope import table_rows
from ..ops.abstract import abstract, infer
from ..ops.launch import Device, Plan
from ..ops.node import Node, dying
from ..sampling_params import SamplingParams
from .batch import abstract_values, input_shapes
from .decode import RING, decode_step, step_inputs
from .graphs import LONG_PASS, max_logits, padded_rows, padded_sequences
from .kv_cache import MAX_TOKENS, PAGE, pages_for
from .sampler import Sampler
from .sequence import SequenceState
from .state_cache import SPARE_SLOTS

__all__ = [
    "FIXED",
    "POOL",
    "SHARE",
    "MemoryPlan",
    "cache_bytes",
    "check",
    "fit",
    "most_slots",
    "peak_bytes",
    "plan",
    "shared_bytes",
    "state_bytes",
    "step_bytes",
    "workspace_bytes",
]

# cuBLAS's workspace, compiled kernels, and what the pool loses to rounding. CUDA's own context is in no plan: it is
# taken before free memory is read.
FIXED = 160 << 20
# What a pool takes for each byte that is alive at the worst moment: its free blocks do not always fit together. CuPy's
# rules, simulated for the presets, give 1.3 to 1.65 (tests/engine/test_memory.py).
POOL = 1.7
# Of the memory that is free beside weights and workspace, the part that the cache takes where it may take what it can:
# the rest is for captured graphs of other sizes, and for other processes.
SHARE = 0.9
# A long pass is planned where its workspace is at most this part of the free memory: it is seldom needed, and the cache
# always.
_LONG_PASS_SHARE = 1 / 16


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a model takes on the GPU. tokens: that the cache holds; dtype: of weights and activations; cache_dtype: of
    the cache, if that is another; states, slots: of layers that have a state of each sequence, and how many of those
    there are room for."""

    weights: int
    cache: int
    workspace: int
    tokens: int
    dtype: str
    cache_dtype: str = ""
    states: int = 0
    slots: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.cache + self.states + self.workspace

    def parts(self) -> tuple[tuple[str, int], ...]:
        """What and how much, in the order of allocation."""
        kind = self.cache_dtype and f" in {self.cache_dtype}"
        states = ((f"states ({self.slots} slots)", self.states),) if self.states else ()
        return (
            (f"weights ({self.dtype})", self.weights),
            (f"cache ({self.tokens} tokens{kind})", self.cache),
            *states,
            ("workspace", self.workspace),
        )

    def describe(self) -> str:
        """Sum and parts in one line, in GB (10^9 bytes)."""
        return f"{_gb(self.total)} = " + " + ".join(f"{name} {_gb(size)}" for name, size in self.parts())


def cache_bytes(config: ModelConfig, dtype: np.dtype[Any], tokens: int) -> int:
    """Keys and values of all layers for that many tokens, in whole pages. dtype: of the cache."""
    return config.kv_size * pages_for(tokens) * PAGE * dtype.itemsize


def state_bytes(config: ModelConfig, dtype: np.dtype[Any]) -> int:
    """The state of one sequence in all layers that have one. dtype: of activations."""
    conv, state = (math.prod(shape) for shape in config.state_shapes)
    return len(config.delta_layers) * (conv * dtype.itemsize + state * DTYPES["f32"].itemsize)


def workspace_bytes(config: ModelConfig, dtype: np.dtype[Any], tokens: int, device: Device, logit_rows: int = 1) -> int:
    """The most that activations and scratch take at one time in a pass over ``tokens`` tokens of one sequence, with the
    whole of the last layer: so it is where the logits of all of them are asked for."""
    pages = pages_for(tokens)
    values = abstract_values(config, dtype, input_shapes(tokens, 1, pages, logit_rows), pages, tokens)
    graph = decoder(config)
    nodes = fuse([*graph.body, *graph.selected_rows()], PREFILL_RULES)
    return peak_bytes(nodes, {**values}, dtype, device)


def step_bytes(config: ModelConfig, dtype: np.dtype[Any], sequences: int, device: Device) -> int:
    """The most that a decode step of so many sequences takes at one time, the sampler's inputs included: with penalties
    and a bias those are counts and a number for each token of the vocabulary, as logits and penalised logits are."""
    params = SamplingParams(repetition_penalty=2.0, logit_bias={0: 1.0})
    sampler = Sampler(config.vocab_size, [SequenceState([0], params, frozenset())])
    inputs = sampler.empty_inputs(sequences)
    shapes = {name: array.shape for name, array in step_inputs(sequences, 1, 0).items()}
    values: dict[str, Array | None] = {**abstract_values(config, dtype, shapes, 2, 1)}
    values |= {name: abstract(array.shape, array.dtype) for name, array in inputs.items()}
    values["ring"] = abstract((RING, sequences), DTYPES["i32"])
    nodes = decode_step(decoder(config), sequences, sampler.nodes)
    return sum(array.nbytes for array in inputs.values()) + peak_bytes(nodes, values, dtype, device)


def peak_bytes(nodes: Sequence[Node], values: dict[str, Array | None], T: np.dtype[Any], device: Device) -> int:
    """Bytes alive at the worst moment, beyond the given values."""
    alive, peak = dict[str, int](), 0
    for (node, call), dead in zip(infer(nodes, values, T), dying(nodes), strict=True):
        signature = call.op.signature
        made = (n for n, spec in zip(node.outs, signature.outs, strict=True) if spec.name not in signature.in_place)
        alive |= {name: values[name].nbytes for name in made}  # type: ignore[union-attr]
        scratch = 0
        if call.op.kernels is not None and not call.op.matmul:  # a product over many rows is cuBLAS's
            plan = call.op.kernels(call, device)
            scratch = _scratch_bytes(plan, plan.scratch.keys() - plan.shared)
        peak = max(peak, sum(alive.values()) + scratch)
        for name in dead:
            alive.pop(name, None)
    return peak


def _scratch_bytes(plan: Plan, names: Iterable[str]) -> int:
    buffers = [plan.scratch[name] for name in names]
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for shape, dtype in buffers)


def shared_bytes(
    config: ModelConfig, dtype: np.dtype[Any], cache: np.dtype[Any], tokens: int, device: Device, rows: int = 2
) -> int:
    """Scratch that all passes share: pages in the model's dtype, as many as the cache of that many tokens has, if the
    cache holds another dtype and a prompt's attention needs them. rows: of the prompt, more than its one sequence."""
    if cache == dtype:
        return 0
    values = abstract_values(config, dtype, input_shapes(rows, 1, 1, 1), pages_for(tokens) + 1, rows, cache)
    calls = (call for _, call in infer(decoder(config).body, {**values}, dtype) if "C" in call.dtypes)
    plans = (call.op.kernels(call, device) for call in calls if call.op.kernels is not None)
    return sum({_scratch_bytes(plan, plan.shared) for plan in plans})  # once for each size of a layer's pages


def plan(
    config: ModelConfig,
    weights: int,
    dtype: np.dtype[Any],
    context: int,
    tokens: int,
    chunk: int,
    device: Device,
    unpacked: int = 0,
    cache: np.dtype[Any] | None = None,
    running: int = 1,
    slots: int = 1,
) -> MemoryPlan:
    """What a model takes whose weights have that many bytes, and whose activations have that dtype.

    context: tokens of a sequence; tokens: of the whole cache; chunk: the most tokens of one prefill pass; unpacked:
    bytes of scratch for the numbers of quantised weights, which all passes share; cache: the dtype of keys and values,
    that of the activations by default; running: the most sequences of one decode step; slots: for states of sequences.
    """
    cache = cache or dtype
    tables = sum(4 * rope.dim * table_rows(rope, context) for rope in config.ropes.values())
    # Logits of all tokens of a pass, where they are asked for; or what the largest decode step takes.
    logits = 4 * config.vocab_size * min(max_logits(config.vocab_size), chunk, tokens)
    step = math.ceil(POOL * step_bytes(config, dtype, padded_sequences(running), device))
    # What captured passes share, and one that is not captured.
    work = 2 * workspace_bytes(config, dtype, padded_rows(min(chunk, max(1, tokens))), device)
    padding = cache_bytes(config, cache, PAGE)
    shared = shared_bytes(config, dtype, cache, tokens, device)
    return MemoryPlan(
        weights=weights,
        cache=cache_bytes(config, cache, tokens),
        workspace=math.ceil(POOL * work) + tables + max(logits, step) + padding + unpacked + shared + FIXED,
        tokens=tokens,
        dtype=dtype_name(dtype),
        cache_dtype="" if cache == dtype else dtype_name(cache),
        states=state_bytes(config, dtype) * (slots + 1),  # and that of padding
        slots=slots,
    )


def fit(
    config: ModelConfig,
    weights: int,
    dtype: np.dtype[Any],
    context: int,
    tokens: int | None,
    chunks: Sequence[int],
    free: int,
    device: Device,
    unpacked: int = 0,
    cache: np.dtype[Any] | None = None,
    running: int = 1,
) -> tuple[int, MemoryPlan]:
    """The first of ``chunks``, largest first, whose plan fits in ``free`` bytes, or the last; and its plan. One of more
    than ``LONG_PASS`` tokens fits if there is much more room than it needs.

    tokens: as of ``plan``, with decode steps of as many sequences as it has room for at their full length. None: a
    cache of as many whole pages as ``SHARE`` of what is free beside the rest has room for, with decode steps of
    ``running`` sequences; and one of ``context`` tokens, as if they were asked for, where it would be smaller.

    Where layers have states there are slots for ``running`` sequences and ``SPARE_SLOTS`` more, or for as many as a
    page each is there for; but no more than half of what the cache may take has room for, and one at least.
    """

    def of(chunk: int, sequences: int, tokens: int, slots: int = 1) -> MemoryPlan:
        sequences = min(sequences, slots) if config.delta_layers else sequences
        return plan(config, weights, dtype, context, tokens, chunk, device, unpacked, cache, sequences, slots)

    least = tokens or context
    for chunk in chunks:
        found = of(chunk, min(running, max(1, least // context)), least)
        if found.total <= free and (chunk <= LONG_PASS or found.workspace <= free * _LONG_PASS_SHARE):
            break
    slots = 1
    if config.delta_layers:
        owners = running if tokens is None else min(running, pages_for(tokens))
        slots = most_slots(owners, state_bytes(config, dtype), free - found.total)
        found = of(chunk, min(running, max(1, least // context)), least, slots)
    if tokens is None:
        most = _most_tokens(lambda tokens: of(chunk, running, tokens, slots), max(context, chunk), free)
        if most > context:
            found = of(chunk, running, most, slots)
    return chunk, found


def most_slots(owners: int, size: int, free: float) -> int:
    """Slots for states of ``owners`` sequences, if half of ``SHARE`` of what is free has room for so many; one at
    least. size: bytes of one; free: bytes beside a plan with one."""
    return min(owners + SPARE_SLOTS, 1 + max(0, int(SHARE / 2 * min(free, 2.0**62)) // size))


def _most_tokens(of: Callable[[int], MemoryPlan], start: int, free: int) -> int:
    """Tokens of as many pages as ``SHARE`` has room for. of: the plan of a cache of that many tokens, whose total grows
    by as much for each page from ``start`` tokens on."""
    pages = 1024
    total = of(start).total
    page = (of(start + pages * PAGE).total - total) / pages
    rest = total - pages_for(start) * page
    return min(MAX_TOKENS, math.floor(SHARE * (free - rest) / page) * PAGE)


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
