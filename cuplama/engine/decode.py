"""The decode loop: a decode step is captured once as a CUDA graph, and then replayed for every token.

A captured graph reads and writes the same addresses at each replay. So the inputs of a step live in buffers that never
move, and the last node of a step, ``advance``, overwrites them with the inputs of the next step, made from the tokens
that this one drew. The host sends nothing between two steps: it queues up to ``AHEAD`` replays, and reads the drawn
tokens from a ring in host memory that the device writes, a row for each step. The host may therefore learn up to
``AHEAD - 1`` steps late that a sequence has ended; what those steps drew for it is dropped and never shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend, Event
from ..dtypes import Array
from ..models.fusion import BATCH_RULES, FEW_ROWS_RULES, PREFILL_RULES, fuse
from ..models.graph import Graph
from ..ops.linear import MAX_STREAMED_ROWS
from ..ops.node import Node
from .batch import Batch, input_shapes
from .input_buffer import InputBuffer
from .kv_cache import PAGE
from .sampler import TOKEN, Sampler

__all__ = ["AHEAD", "RING", "DecodeLoop", "decode_nodes", "decode_step", "step_inputs"]

# Steps that may be queued and not read yet: enough that the device never waits for the host, and few enough that little
# work is wasted when a sequence ends.
AHEAD = 3
RING = AHEAD + 1  # rows of the ring of drawn tokens: one for each step in flight, and the one that is being read

# The inputs that a step leaves as the next one needs them, in the order of the op ``advance``.
_ADVANCED = ("input_ids", "positions", "slot_mapping", "seq_lens", "rope.rows", "ring", "step")


def decode_nodes(graph: Graph, sequences: int, deterministic: bool = False) -> list[Node]:
    """The nodes from the last tokens of so many sequences to their logits, fused where that is faster.

    For more than ``MAX_STREAMED_ROWS`` sequences other kernels or a library compute the products, and neither fuses
    norms or activations with them. deterministic: the nodes are those of a prompt for any number of sequences, so that
    a token is computed alike in both.
    """
    rules = FEW_ROWS_RULES if sequences <= MAX_STREAMED_ROWS else BATCH_RULES
    return fuse([*graph.body, *graph.every_row()], PREFILL_RULES if deterministic else rules)


def decode_step(graph: Graph, sequences: int, sampling: Sequence[Node], deterministic: bool = False) -> list[Node]:
    """A whole step: the last tokens in, the next tokens drawn, and the inputs advanced to them."""
    advance = Node("advance", _ADVANCED, (*_ADVANCED, TOKEN, "page_table"), {"S": PAGE})
    return [*decode_nodes(graph, sequences, deterministic), *sampling, advance]


def step_inputs(sequences: int, pages: int) -> dict[str, np.ndarray[Any, Any]]:
    """int32 zeros for the inputs of a step by name, those of the sampler left out: one row for each sequence.

    pages: columns of the page table. "step" [1] counts the steps since ``begin``; the ring's row follows from it.
    """
    shapes = input_shapes(sequences, sequences, pages, logit_rows=0) | {"step": (1,)}
    del shapes["logit_rows"]  # a step makes the logits of every row
    return {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}


class DecodeLoop:
    """A captured step of ``sequences`` sequences, for samplers with the ``key`` of the one that it is made with.

    nodes: of ``decode_step``; values: weights, cache and rotation tables by name, whose addresses never change; pages:
    that one sequence may have at most.
    """

    def __init__(
        self,
        backend: Backend,
        nodes: Sequence[Node],
        values: Mapping[str, Array],
        sampler: Sampler,
        sequences: int,
        pages: int,
    ) -> None:
        self._backend, self._nodes, self._values, self.sequences = backend, nodes, values, sequences
        self._inputs = InputBuffer(backend, step_inputs(sequences, pages) | sampler.empty_inputs(sequences))
        self._sampler = sampler
        self._ring, self._device_ring = backend.host_ring((RING, sequences))
        self._outs: dict[str, Array] = {}
        self._graph = backend.capture(self._captured)
        self._events: list[Event] = []
        self._read = 0

    @property
    def ahead(self) -> int:
        """Steps that may be in flight. Log-probabilities are read from the device, so they allow one."""
        return 1 if self._sampler.top_n is not None else AHEAD

    @property
    def in_flight(self) -> int:
        """Steps launched and not read yet."""
        return len(self._events)

    def begin(self, batch: Batch, sampler: Sampler) -> None:
        """Set the buffers. batch: the last token of each sequence, ``sequences`` of them, idle ones included."""
        host = self._inputs.host
        batch.pad_into(host)
        sampler.pad_into(host)
        host["step"][0] = 0
        self._inputs.send()
        self._sampler = sampler
        self._events.clear()
        self._read = 0

    def launch(self) -> None:
        """Queue one step."""
        self._events.append(self._graph.replay())

    def read(self) -> list[np.ndarray[Any, Any]]:
        """Wait for the oldest step in flight. Returns what it drew: host copies of ``Sampler.outs``, in that order."""
        self._events.pop(0).synchronize()
        tokens = self._ring[self._read % RING].copy()
        self._read += 1
        return [tokens, *(self._backend.download(self._outs[name]) for name in self._sampler.outs[1:])]

    def _captured(self) -> None:
        """One step, from the buffers to the buffers."""
        values = {**self._values, **self._inputs.device, "ring": self._device_ring}
        self._outs = {}  # The old outputs are freed before memory for the new ones is asked for.
        self._outs = self._backend.run(self._nodes, values, self._sampler.outs)

    def close(self) -> None:
        """Drop the graph and the buffers."""
        self._graph.close()
        self._inputs.close()
        self._outs = {}
