"""The decode loop: one captured step, replayed per token.

All inputs of a step live in buffers that stay where they are, and the step's last node makes the next step's inputs
from the tokens it drew. So the host only replays the graph, a few steps ahead, and reads the tokens behind the device
from a ring in host memory. What it does with them may lag; what it shows may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend, Event
from ..dtypes import Array
from ..models.fusion import BATCH_RULES, FEW_ROWS_RULES, fuse
from ..models.graph import Graph
from ..ops.linear import MAX_STREAMED_ROWS
from ..ops.node import Node
from .batch import Batch, input_shapes
from .input_buffer import InputBuffer
from .kv_cache import PAGE
from .sampler import TOKEN, Sampler

__all__ = ["AHEAD", "RING", "DecodeLoop", "decode_nodes", "decode_step"]

AHEAD = 3  # steps that may be in flight: enough to hide the host, few enough that a stop wastes little
RING = AHEAD + 1  # rows of the ring of drawn tokens: those in flight, and the one that is being read

# The inputs that a step leaves as the next one needs them, in the order of the op ``advance``.
_ADVANCED = ("input_ids", "positions", "slot_mapping", "seq_lens", "rope.rows", "ring", "step")


def decode_nodes(graph: Graph, sequences: int) -> list[Node]:
    """From the last tokens of so many sequences to their logits, with what pays when fused.

    Beyond a few rows products go to a library, which takes no norm and no activation with them.
    """
    rules = FEW_ROWS_RULES if sequences <= MAX_STREAMED_ROWS else BATCH_RULES
    return fuse([*graph.body, *graph.every_row()], rules)


def decode_step(graph: Graph, sequences: int, sampling: Sequence[Node]) -> list[Node]:
    """A whole step: the last tokens in, the next tokens drawn, and the inputs advanced to them."""
    advance = Node("advance", _ADVANCED, (*_ADVANCED, TOKEN, "page_table"), {"S": PAGE})
    return [*decode_nodes(graph, sequences), *sampling, advance]


class DecodeLoop:
    """A captured step of ``sequences`` sequences, for samplers like the one it is made with.

    nodes: of ``decode_step``; values: weights and everything else that stays where it is, by name; pages: of a sequence
    at most.
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
        shapes = input_shapes(sequences, sequences, pages, logit_rows=0) | {"step": (1,)}
        del shapes["logit_rows"]  # a step wants the logits of every row
        arrays = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        self._inputs = InputBuffer(backend, arrays | sampler.empty_inputs(sequences))
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
        """What the oldest step in flight drew, once it is done: ``Sampler.outs``, in its order."""
        self._events.pop(0).synchronize()
        tokens = self._ring[self._read % RING].copy()
        self._read += 1
        return [tokens, *(self._backend.download(self._outs[name]) for name in self._sampler.outs[1:])]

    def _captured(self) -> None:
        """One step, from the buffers to the buffers."""
        values = {**self._values, **self._inputs.device, "ring": self._device_ring}
        self._outs = {}  # before memory for the new ones is asked for
        self._outs = self._backend.run(self._nodes, values, self._sampler.outs)

    def close(self) -> None:
        """Drop the graph and the buffers."""
        self._graph.close()
        self._inputs.close()
        self._outs = {}
