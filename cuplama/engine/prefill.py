"""A captured pass over prompts: the body of the model as one CUDA graph, replayed for batches of nearly the same size.

Launching the kernels of a pass one by one takes the host several milliseconds, longer than a short prompt takes the GPU
(a 0.5B model, 128 tokens, on an H200: 5.9 ms launch by launch, 1.4 ms as a graph). The head of the model is not
captured: it is a few launches, their number of rows is the number of logits that are asked for, and the host queues
them while the GPU is busy with the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..backends import Backend, CapturedGraph
from ..dtypes import Array
from .batch import ASKED, Batch, input_shapes
from .input_buffer import InputBuffer

__all__ = ["PrefillPass"]

_Body = Callable[[Mapping[str, Array]], dict[str, Array]]  # the inputs of a pass -> what the head needs of it


class PrefillPass:
    """The body of a pass over ``rows`` new tokens of ``sequences`` sequences, whose batches are padded to that size.

    pages: of a sequence at most; sharing: a captured graph whose memory it uses as well.
    """

    def __init__(
        self,
        backend: Backend,
        body: _Body,
        rows: int,
        sequences: int,
        pages: int,
        sharing: CapturedGraph | None = None,
    ) -> None:
        self._backend, self._body, self._shared = backend, body, sharing
        shapes = input_shapes(rows, sequences, pages, logit_rows=rows)
        self._inputs = InputBuffer(backend, {name: np.zeros(shape, np.int32) for name, shape in shapes.items()})
        self._hidden: dict[str, Array] = {}
        self.graph: CapturedGraph | None = None

    def send(self, batch: Batch) -> dict[str, Array]:
        """Copy the batch's inputs to the device, padded. Returns the device arrays by name.

        Those of ``ASKED`` are cut to the rows that the batch asks for. The next ``send`` overwrites the arrays.
        """
        batch.pad_into(self._inputs.host)
        self._inputs.send()
        device = self._inputs.device
        return {**device, **{name: device[name][: len(batch.arrays[name])] for name in ASKED}}

    def replay(self) -> dict[str, Array]:
        """Queue the captured body. Returns its result by name; the next replay overwrites it."""
        if self.graph is None:
            self.graph = self._backend.capture(self._captured, self._shared)
        self.graph.replay()
        return dict(self._hidden)

    def _captured(self) -> None:
        self._hidden = {}  # The old result is freed before memory for the new one is asked for.
        self._hidden = self._body(self._inputs.device)

    def close(self) -> None:
        """Give back the graph and its memory."""
        self._hidden = {}
        if self.graph is not None:
            self.graph.close()
        self._inputs.close()
