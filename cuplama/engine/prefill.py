"""A captured pass over a prompt: one graph up to the head, replayed for prompts of nearly the same length.

Launching the kernels of a pass one by one takes the host milliseconds, longer than a short prompt takes the GPU. The
head, a few launches that depend on how many logits are asked for, is queued while the GPU is busy with the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..backends import Backend, CapturedGraph
from ..dtypes import Array
from .batch import Batch, input_shapes
from .input_buffer import InputBuffer

__all__ = ["PrefillPass"]

Body = Callable[[Mapping[str, Array]], dict[str, Array]]  # the inputs of a pass -> what the head needs of it


class PrefillPass:
    """The body of a pass over ``rows`` new tokens of ``sequences`` sequences, whose batches are padded to that size."""

    def __init__(self, backend: Backend, body: Body, rows: int, sequences: int, pages: int) -> None:
        """pages: of a sequence at most."""
        self._backend, self._body = backend, body
        shapes = input_shapes(rows, sequences, pages, logit_rows=rows)
        self._inputs = InputBuffer(backend, {name: np.zeros(shape, np.int32) for name, shape in shapes.items()})
        self._hidden: dict[str, Array] = {}
        self._graph: CapturedGraph | None = None

    def send(self, batch: Batch) -> dict[str, Array]:
        """Set the inputs. Returns them by name, of "logit_rows" only those that are wanted; the next send overwrites
        them."""
        batch.pad_into(self._inputs.host)
        self._inputs.send()
        device = self._inputs.device
        return {**device, "logit_rows": device["logit_rows"][: len(batch.arrays["logit_rows"])]}

    def replay(self) -> dict[str, Array]:
        """Queue the captured body. Returns its result by name; the next replay overwrites it."""
        if self._graph is None:
            self._graph = self._backend.capture(self._captured)
        self._graph.replay()
        return dict(self._hidden)

    def _captured(self) -> None:
        self._hidden = {}  # before memory for the new one is asked for
        self._hidden = self._body(self._inputs.device)

    def close(self) -> None:
        """Give back the graph and its memory."""
        self._hidden = {}
        if self._graph is not None:
            self._graph.close()
        self._inputs.close()
