"""The node list of a training step, from a model's config alone: forward pass, loss and gradients.

The head takes some rows at a time, forward and backward at once: logits of all tokens, which would be the largest array
of all, never exist.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..dtypes import DTYPES
from ..errors import ParameterError
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import HIDDEN, Graph, decoder
from ..ops.node import Node
from ..ops.signature import OpError
from .backward import Backward, gradient_name

__all__ = [
    "LOSS",
    "StepPlan",
    "Teacher",
    "array_shapes",
    "chunk_rows",
    "evaluation_nodes",
    "teacher_value",
    "training_step",
]

LOSS = "loss"  # [1] float32: the losses of all passes since it was 0 are added to it
_LOGIT_BYTES = 1 << 30  # of a chunk's logits at most, in float32
_MAX_CHUNK = 2048  # Rows of a chunk: enough for a product to reach its full speed.
# What teachers read of the batch. A token's row in their rotation tables is its position.
_SHARED = {"input_ids": "input_ids", "positions": "positions", "cu_seqlens": "cu_seqlens", "rope.rows": "positions"}


@dataclass(frozen=True)
class Teacher:
    """A model whose predictions are learned, too. Its weights and tables are values named by ``teacher_value``."""

    config: ModelConfig
    number: int


@dataclass(frozen=True)
class StepPlan:
    """nodes: of a step; arrays: the gradient arrays that they update, by name; rows: tokens of a batch."""

    nodes: Sequence[Node]
    arrays: Collection[str]
    rows: int


def array_shapes(
    config: ModelConfig, plan: StepPlan, T: np.dtype[Any]
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """(shape, dtype) of each of a step's gradient arrays: of a weight, or of the rows that are sliced for the head."""
    rows = (plan.rows, config.hidden_size), T
    weights = {gradient_name(name): (shape, DTYPES["f32"]) for name, shape in config.weight_shapes().items()}
    return {name: weights.get(name, rows) for name in plan.arrays}


def teacher_value(number: int, name: str) -> str:
    """The name of a teacher's value."""
    return f"teacher{number}.{name}"


def chunk_rows(rows: int, vocab_size: int) -> int:
    """Rows that go through the head at a time."""
    return max(1, min(rows, _MAX_CHUNK, _LOGIT_BYTES // (4 * vocab_size)))


@dataclass
class _Head:
    """The last norm, and what each chunk of rows goes through behind it."""

    norm: Sequence[Node]
    chunk: Sequence[Node]

    @classmethod
    def of(cls, graph: Graph) -> _Head:
        nodes = graph.every_row()
        at = next(i for i, node in enumerate(nodes) if node.op == "linear")
        return cls(nodes[:at], nodes[at:])

    def nodes(self, number: int, first: int, rows: int) -> list[Node]:
        """The nodes of one chunk; the values that they make have its number."""
        source = self.norm[-1].outs[0]
        own = {v: f"head.{number}.{v}" for v in (source, *(out for node in self.chunk for out in node.outs))}
        cut = Node("slice_rows", (own[source],), (source,), {"first": first, "r": rows})
        return [cut, *(_renamed(node, own) for node in self.chunk)]


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    ins, outs = (tuple(names.get(v, v) for v in values) for values in (node.ins, node.outs))
    return replace(node, ins=ins, outs=outs)


@dataclass
class _Chunks:
    """The chunks of the head with their losses. alpha: the part of the loss that comes from the teachers."""

    rows: int
    vocab_size: int
    alpha: float = 0.0
    teachers: Sequence[_Head] = ()
    cuts: Sequence[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        size = chunk_rows(self.rows, self.vocab_size)
        self.cuts = [(first, min(size, self.rows - first)) for first in range(0, self.rows, size)]

    def loss(self, head: _Head, number: int, first: int, rows: int) -> tuple[list[Node], str]:
        """(nodes of a chunk from its rows to its loss, the name of that)."""
        nodes, mixture = list[Node](), ""
        for i, teacher in enumerate(self.teachers):
            nodes += teacher.nodes(number, first, rows)
            before, mixture = mixture, f"head.{number}.mixture{i}"
            ins = (nodes[-1].outs[0], *([before] if before else []))
            nodes.append(Node("softmax_mixture", (mixture,), ins, {"share": 1 / len(self.teachers)}))
        nodes += head.nodes(number, first, rows)
        loss, ins = f"head.{number}.loss", (nodes[-1].outs[0], "targets", "weights", *([mixture] if mixture else []))
        # A product takes the gradient of its result in the model's dtype; what may follow on it is float32 both ways.
        U = "T" if "U" in nodes[-1].attrs else "f32"
        attrs = {"V": self.vocab_size, "alpha": self.alpha, "first": first, "U": U}
        nodes.append(Node("cross_entropy", (loss, f"head.{number}.dlogits"), ins, attrs))
        nodes.append(Node("add_sum", (LOSS,), (LOSS, loss)))
        return nodes, loss


def training_step(
    config: ModelConfig,
    rows: int,
    trained: Collection[str],
    recompute: str = "nothing",
    dropout: float = 0.0,
    teachers: Sequence[Teacher] = (),
    alpha: float = 0.0,
) -> StepPlan:
    """A pass over ``rows`` tokens, which adds its loss to ``LOSS`` and its gradients to the arrays of ``trained``.

    trained: canonical names of weights; recompute: one of ``RECOMPUTE``; dropout: of the residual stream; teachers:
    models whose mean prediction makes up ``alpha`` of the loss. Values that a run needs: weights, rotation tables, what
    ``Batch.arrays`` has, ``LOSS``, "dropout.seed" with dropout, and the gradient arrays. Raises ParameterError for a
    model with an op that has no gradient.
    """
    graph = decoder(config, cached=False, dropout=dropout)
    guides = [_teacher(teacher) for teacher in teachers]
    head = _Head.of(graph)
    chunks = _Chunks(rows, config.vocab_size, alpha if teachers else 0.0, [_Head.of(guide) for guide in guides])
    nodes = [node for guide in guides for node in (*guide.body, *_Head.of(guide).norm)]
    body = [*graph.body, *head.norm]
    nodes += body
    parts = [chunks.loss(head, i, *cut) for i, cut in enumerate(chunks.cuts)]
    backward = Backward([*nodes, *(node for part, _ in parts for node in part)], trained, recompute)
    try:
        for part, loss in parts:
            backward.nodes += part
            backward.through(part, loss)
        backward.through(body)
    except OpError as e:
        raise ParameterError(f"{config.architecture} cannot be trained: {e}") from None
    return StepPlan(fuse([*nodes, *backward.nodes], PREFILL_RULES), tuple(backward.arrays), rows)


def evaluation_nodes(config: ModelConfig, rows: int) -> list[Node]:
    """A pass that only adds the loss of a batch to ``LOSS``."""
    graph = decoder(config, cached=False)
    head, chunks = _Head.of(graph), _Chunks(rows, config.vocab_size)
    parts = [chunks.loss(head, i, *cut)[0] for i, cut in enumerate(chunks.cuts)]
    return fuse([*graph.body, *head.norm, *(node for part in parts for node in part)], PREFILL_RULES)


def _teacher(teacher: Teacher) -> Graph:
    """A teacher's graph, whose values have names of their own."""
    graph = decoder(teacher.config, cached=False)
    nodes = (*graph.body, *graph.head)
    values = {v for node in nodes for v in (*node.ins, *node.outs)}
    names = {v: _SHARED.get(v) or teacher_value(teacher.number, v) for v in values}
    body, head = ([_renamed(node, names) for node in part] for part in (graph.body, graph.head))
    head = [replace(node, ins=tuple(_as_hidden(v, names) for v in node.ins)) for node in head]
    return Graph(body, head, [names[stream] for stream in graph.streams])


def _as_hidden(value: str, names: Mapping[str, str]) -> str:
    return HIDDEN if value == names[HIDDEN] else value
