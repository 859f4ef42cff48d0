"""The decode loop: a decode step is captured once as a CUDA graph, and then replayed for every token.

A captured graph reads and writes the same addresses at each replay. So the inputs of a step live in buffers that never
move, and the last node of a step, ``advance``, overwrites them with the inputs of the next step, made from the tokens
that this one drew. The host sends nothing between two steps: it queues up to ``AHEAD`` replays, and reads the drawn
tokens from a ring in host memory that the device writes, a row for each step. The host may therefore learn up to
``AHEAD - 1`` steps late that a sequence has ended; what those steps drew for it is dropped and never shown.

A row of the buffers belongs to one sequence, or to none. A sequence that joins, leaves or gets a page changes a few
words of its row, behind the steps that are queued: nobody waits, and the others do not notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend, CapturedGraph, Event, Fetch
from ..dtypes import Array
from ..models.fusion import BATCH_RULES, EIGHT_BIT_BATCH_RULES, FEW_ROWS_RULES, PREFILL_RULES, fuse
from ..models.graph import LOGITS, Graph
from ..ops.linear import MAX_STREAMED_ROWS
from ..ops.node import Node
from ..ops.weights import MAX_PACKED_ROWS
from .batch import ASKED, INPUTS, Batch, input_shapes
from .input_buffer import InputBuffer
from .kv_cache import PAGE
from .sampler import MASK, TOKEN, Sampler, fill_masks
from .sequence import SequenceState

__all__ = ["AHEAD", "RING", "DecodeLoop", "decode_nodes", "decode_step", "draw_nodes", "step_inputs"]

# Steps that may be queued and not read yet: enough that the device never waits for the host, and few enough that little
# work is wasted when a sequence ends.
AHEAD = 3
RING = AHEAD + 1  # rows of the ring of drawn tokens: one for each step in flight, and the one that is being read

# The inputs that a step leaves as the next one needs them, in the order of the op ``advance``.
_ADVANCED = ("input_ids", "positions", "slot_mapping", "seq_lens", "rope.rows", "ring", "step")


def decode_nodes(graph: Graph, sequences: int, deterministic: bool = False, activations: str = "auto") -> list[Node]:
    """The nodes from the last tokens of so many sequences to their logits, fused where that is faster.

    For more than ``MAX_STREAMED_ROWS`` sequences other kernels or a library compute the products, and neither fuses
    norms or activations with them. deterministic: the nodes are those of a prompt for any number of sequences, so that
    a token is computed alike in both. activations: of the backend.
    """
    rules = FEW_ROWS_RULES if sequences <= MAX_STREAMED_ROWS else BATCH_RULES
    if activations == "fp8" and sequences > MAX_PACKED_ROWS:
        rules = EIGHT_BIT_BATCH_RULES
    return fuse([*graph.body, *graph.every_row()], PREFILL_RULES if deterministic else rules)


def draw_nodes(sampling: Sequence[Node]) -> list[Node]:
    """The nodes from logits to the next tokens, and the inputs advanced to them."""
    return [*sampling, Node("advance", _ADVANCED, (*_ADVANCED, TOKEN, "page_table"), {"S": PAGE})]


def decode_step(graph: Graph, sequences: int, sampling: Sequence[Node], deterministic: bool = False) -> list[Node]:
    """A whole step: the last tokens in, the next tokens drawn, and the inputs advanced to them."""
    return [*decode_nodes(graph, sequences, deterministic), *draw_nodes(sampling)]


def step_inputs(sequences: int, pages: int, padding_page: int) -> dict[str, np.ndarray[Any, Any]]:
    """int32 inputs of a step by name, those of the sampler left out: a row for each sequence, which belongs to none.

    pages: columns of the page table. "step" [1] counts the steps since ``begin``; the ring's row follows from it.
    """
    shapes = input_shapes(sequences, sequences, pages, logit_rows=0) | {"step": (1,)}
    # A step makes the logits of every row.
    found = {name: np.zeros(shape, np.int32) for name, shape in shapes.items() if name not in ASKED}
    found["cu_seqlens"][:] = np.arange(sequences + 1)
    found["slot_mapping"][:] = padding_page * PAGE
    found["page_table"][:] = padding_page
    return found


# The inputs with a row for each sequence.
_ROWS = tuple(spec.name for spec in INPUTS if spec.dims[0] in ("n", "b"))


class DecodeLoop:
    """A captured step of ``sequences`` rows, for samplers that can do what ``needs`` says.

    nodes: of ``decode_nodes`` and of ``draw_nodes``; values: weights, cache and rotation tables by
    name, whose addresses never change; pages: that one sequence may have at most; sharing: a captured graph whose
    memory it uses as well.
    """

    def __init__(
        self,
        backend: Backend,
        nodes: tuple[Sequence[Node], Sequence[Node]],
        values: Mapping[str, Array],
        sampler: Sampler,
        sequences: int,
        pages: int,
        padding_page: int,
        sharing: CapturedGraph | None = None,
    ) -> None:
        self._backend, self._values, self.sequences, self.needs = backend, values, sequences, sampler.needs
        self._empty = step_inputs(sequences, pages, padding_page) | sampler.empty_inputs(sequences)
        self._inputs = InputBuffer(backend, self._empty)
        self._ring, self._device_ring = backend.host_ring((RING, sequences))
        self._outs, self._score_names = dict[str, Array](), sampler.outs[1:]
        self._forward, self._draw = nodes
        self._logits = dict[str, Array]()
        # A mask is made of the token before, which the host reads while the device is busy with the logits: so a step
        # with masks is two graphs, and any other is one.
        bodies = [self._make_logits, self._make_tokens] if self.needs.masked else [self._whole]
        self.graphs = list[CapturedGraph]()
        for body in bodies:
            self.graphs.append(backend.capture(body, sharing if not self.graphs else self.graphs[0]))
        self._flying: deque[tuple[Event, Fetch | None]] = deque()
        self._read = 0
        self.rows: list[SequenceState | None] = [None] * sequences

    # -- rows

    def begin(self, members: Sequence[SequenceState], batch: Batch, sampler: Sampler) -> None:
        """Give the first rows to these sequences, and the others to none. Nothing may be in flight.

        batch, sampler: of their last tokens, in this order.
        """
        host, count = self._inputs.host, len(members)
        for name, array in self._empty.items():
            host[name][...] = array
        for name in _ROWS:
            array = batch.arrays[name]
            host[name][tuple(slice(size) for size in array.shape)] = array
        sampler.pad_into(host)
        self._inputs.send()
        self.rows = [*members, *[None] * (self.sequences - count)]
        self._flying.clear()
        self._read = 0

    def join(self, row: int, s: SequenceState, batch: Batch, sampler: Sampler) -> None:
        """Give a row to a sequence. batch, sampler: of its last token alone."""
        self.rows[row] = s
        host = self._inputs.host
        for name in _ROWS:
            array = batch.arrays[name]
            host[name][row] = self._empty[name][row]
            host[name][row, ...][tuple(slice(size) for size in array.shape[1:])] = array[0]
        for name, array in sampler.inputs.items():
            host[name][row] = array[0]
        for name in (*_ROWS, *sampler.inputs):
            self._inputs.change(name, row)

    def leave(self, row: int) -> None:
        """A row belongs to no sequence from now on."""
        self.rows[row] = None
        for name in _ROWS:
            self._inputs.host[name][row] = self._empty[name][row]
            self._inputs.change(name, row)

    def set_pages(self, row: int, pages: Sequence[int], first: int) -> None:
        """The sequence of a row has new pages, from number ``first`` on."""
        self._inputs.host["page_table"][row, first : len(pages)] = pages[first:]
        self._inputs.change("page_table", row, first, len(pages) - first)

    # -- steps

    @property
    def in_flight(self) -> int:
        """Steps queued and not read yet."""
        return len(self._flying)

    def launch(self) -> None:
        """Queue one step; of a step with masks its first half."""
        self._inputs.send_changes()
        event = self.graphs[0].replay()
        if not self.needs.masked:
            self._fly(event)

    def finish(self) -> None:
        """Queue the second half of a step with masks: the masks of the sequences that are in it now."""
        masks = self._inputs.host[MASK]
        for row, s in enumerate(self.rows):
            if s is not None and s.constraint is not None:
                fill_masks(masks[row : row + 1], [s])
                self._inputs.change(MASK, row)
        self._inputs.send_changes()
        self._fly(self.graphs[1].replay())

    def _fly(self, event: Event) -> None:
        scores = [self._outs[name] for name in self._score_names]
        self._flying.append((event, self._backend.fetch(scores) if scores else None))

    def read(self) -> list[np.ndarray[Any, Any]]:
        """Wait for the oldest step in flight. Returns what it drew: host copies of ``Sampler.outs``, in that order."""
        event, scores = self._flying.popleft()
        event.synchronize()
        tokens = self._ring[self._read % RING].copy()
        self._read += 1
        return [tokens, *(scores.wait() if scores is not None else [])]

    # -- what is captured

    def _whole(self) -> None:
        self._make_logits()
        self._make_tokens()

    def _make_logits(self) -> None:
        values = {**self._values, **self._inputs.device}
        self._logits = {}  # The old ones are freed before memory for the new ones is asked for.
        self._logits = self._backend.run(self._forward, values, (LOGITS,))

    def _make_tokens(self) -> None:
        values = {**self._inputs.device, **self._logits, "ring": self._device_ring}
        self._outs = {}
        self._outs = self._backend.run(self._draw, values, (TOKEN, *self._score_names))

    def close(self) -> None:
        """Drop the graphs and the buffers."""
        for graph in self.graphs:
            graph.close()
        self._inputs.close()
        self._outs, self._logits = {}, {}
