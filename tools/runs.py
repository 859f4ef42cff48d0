"""What a model gives for a prompt on any backend, with the experts of each token: in one piece, and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np

from cuplama import Model
from cuplama.dtypes import Array
from cuplama.engine.decode import decode_nodes
from cuplama.engine.input_buffer import InputBuffer
from cuplama.engine.sequence import SequenceState
from cuplama.models.graph import LOGITS
from cuplama.ops.node import Node

from .divergence import Rows, stacked

__all__ = ["in_one_piece", "step_by_step", "stepwise"]

_Host = np.ndarray[Any, Any]


def _routers(nodes: Sequence[Node]) -> list[tuple[str, ...]]:
    """What the routers among the nodes give, layer by layer: the names of experts and weights."""
    parts = [part for node in nodes for part in (node.parts or (node,))]
    chosen = {part.ins[0] for part in parts if part.op == "sort_pairs"}  # The gate of a shared expert has no pairs.
    return [part.outs for part in parts if part.outs[0] in chosen]


def in_one_piece(model: Model, prompt: list[int]) -> Rows:
    """What one pass over a prompt gives: launch by launch, padded as it is when it is captured. The prompt has at most
    ``prefill_chunk`` tokens."""
    backend, layers = model.backend, list[tuple[_Host, _Host]]()
    run = backend.run

    def watched(nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        routers = _routers(nodes)
        outs = run(nodes, values, (*keep, *(name for names in routers for name in names)))
        for experts, weights in routers:
            layers.append((backend.download(outs[experts]), backend.download(outs[weights])))
        return {name: outs[name] for name in keep}

    assert len(prompt) <= backend.prefill_chunk, f"{len(prompt)} tokens are more than one pass"
    model.engine.runner.drop_graphs()  # A captured graph would be replayed, which runs no nodes.
    with mock.patch.object(backend, "run", watched):
        logits = model.logits(prompt)
    return stacked(logits, layers)


def step_by_step(model: Model, prompt: list[int]) -> Rows:
    """What decode steps give, one for each token, through their fused nodes, launch by launch."""
    backend, runner = model.backend, model.engine.runner
    sequence = SequenceState(prompt[:1], model.params(), frozenset())
    nodes = decode_nodes(runner.graph, 1)
    names = [LOGITS, *(name for names in _routers(nodes) for name in names)]
    steps: list[list[_Host]] = []
    sequence.slot = runner.cache.states.begin()
    for n in range(1, len(prompt) + 1):
        sequence.tokens = prompt[:n]
        runner.cache.extend(sequence.pages, n)
        inputs = InputBuffer(backend, runner.batch([(sequence, 1)]).arrays).device
        outs = backend.run(nodes, {**runner.values, **inputs}, names)
        steps.append([backend.download(outs[name]).copy() for name in names])
        sequence.cached = n
    runner.cache.release(sequence.pages)
    sequence.slot = runner.cache.states.release(sequence.slot)
    logits, *routed = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    return stacked(logits, list(zip(routed[::2], routed[1::2], strict=True)))


def stepwise(model: Model, prompt: list[int]) -> _Host:
    """The logits [n, vocab] of ``step_by_step``."""
    return step_by_step(model, prompt).logits
