"""The decode loop on a device that can record: one recorded step, replayed per token.

All inputs of a step live in buffers that stay where they are, and the step's last op makes the next step's inputs from
the tokens it drew. So the host only replays the recording, a few steps ahead, and reads the tokens behind the device
from a ring in host memory. What it does with them may lag; what it shows may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import PAGE, block_table, pages_for
from .fuse import BATCH_RULES, RULES, fuse
from .graph import LOGITS, Node
from .op import Array
from .ops.linear import STREAMED_ROWS

if TYPE_CHECKING:
    from .engine import Engine, Generation, Sampler

__all__ = ["DecodeLoop", "batch_size"]

AHEAD = 3  # steps that may be in flight: enough to hide the host, few enough that a stop wastes little

# A recording is made for these numbers of sequences; a batch in between is filled up with idle rows.
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


def batch_size(sequences: int) -> int:
    """Rows of the recording that serves this many sequences."""
    return next((s for s in _SIZES if s >= sequences), sequences)


class DecodeLoop:
    """A recorded decode step for ``size`` sequences, with the optional inputs that ``sampler`` has.

    Idle rows decode into the cache's spare page.
    """

    def __init__(self, engine: Engine, size: int, sampler: Sampler) -> None:
        self._engine, self._backend, self.size = engine, engine.backend, size
        backend, pages = engine.backend, pages_for(engine.context)
        counters = ("ids", "pos", "slots", "lengths", "rope.rows")
        self._inputs: dict[str, Array] = {name: backend.zeros((size,), np.dtype(np.int32)) for name in counters}
        self._inputs["starts"] = backend.upload(np.arange(size + 1, dtype=np.int32))
        self._inputs["blocks"] = backend.zeros((size, pages), np.dtype(np.int32))
        self._step = backend.zeros((1,), np.dtype(np.int32))
        self._sampling = {k: backend.zeros((size, *v.shape[1:]), v.dtype) for k, v in sampler.inputs.items()}
        self._sampler = sampler
        self._ring, self._device_ring = backend.host_ring((AHEAD + 1, size))
        self._scores: tuple[Array, ...] = ()
        self._recording = backend.recording(self._body)
        self._events: list[Any] = []
        self._read = 0

    @property
    def ahead(self) -> int:
        """Steps that may be in flight. Log-probabilities are read from the device, so they allow one."""
        return 1 if self._sampler.top_n is not None else AHEAD

    @property
    def in_flight(self) -> int:
        """Steps launched and not read yet."""
        return len(self._events)

    def begin(self, active: Sequence[Generation], sampler: Sampler) -> None:
        """Set the buffers for these sequences, whose last token has been drawn but not fed."""
        idle = self.size - len(active)
        spare = self._engine.cache.spare
        blocks = np.full(self._inputs["blocks"].shape, spare, np.int32)
        table = block_table([s.pages for s in active])
        blocks[: len(active), : table.shape[1]] = table
        pos = np.array([len(s.tokens) - 1 for s in active] + [0] * idle, np.int32)
        page = blocks[np.arange(self.size), pos // PAGE]
        regime = [self._engine.rope_row(s) for s in active] + [0] * idle
        host = {
            "ids": np.array([s.tokens[-1] for s in active] + [0] * idle, np.int32),
            "pos": pos,
            "slots": page * PAGE + pos % PAGE,
            "lengths": pos + 1,
            "rope.rows": np.array(regime, np.int32),
            "blocks": blocks,
        }
        for name, array in host.items():
            self._backend.write(self._inputs[name], array)
        self._backend.write(self._step, np.zeros(1, np.int32))
        self._sampler = sampler
        for name, array in sampler.inputs.items():
            padding = np.zeros((idle, *array.shape[1:]), array.dtype)
            self._backend.write(self._sampling[name], np.concatenate([array, padding]))
        self._events.clear()
        self._read = 0

    def close(self) -> None:
        """Drop the recording and the buffers."""
        self._recording.close()
        self._inputs.clear()
        self._sampling.clear()
        self._scores = ()

    def launch(self) -> None:
        """Queue one step."""
        self._events.append(self._recording.run())

    def read(self) -> tuple[np.ndarray[Any, Any], ...]:
        """The tokens of the oldest step in flight, [size], once it is done; then the log-probabilities, if any."""
        self._events.pop(0).synchronize()
        tokens = self._ring[self._read % len(self._ring)].copy()
        self._read += 1
        return (tokens, *(self._backend.download(a) for a in self._scores))

    def _body(self) -> None:
        """One step, from the buffers to the buffers."""
        backend, inputs = self._backend, self._inputs
        values = {**self._engine.values, **inputs}
        logits = backend.run(self._engine.decode_nodes(self.size), values, (LOGITS,))[LOGITS]
        # "lengths" is the position of the token to draw: one more than that of the token just fed.
        tokens, *scores = self._sampler.draw(backend, self._sampling, logits, inputs["lengths"])
        self._scores = tuple(scores)
        state = [inputs[k] for k in ("ids", "pos", "slots", "lengths", "rope.rows")]
        backend.call("advance", [*state, self._device_ring, self._step, tokens, inputs["blocks"]], {"S": PAGE})


def decode_nodes(nodes: Sequence[Node], size: int = 1) -> list[Node]:
    """The node list of a decode step of ``size`` sequences: every row is wanted, and what pays when fused is.

    Beyond a few rows products go to a library, which takes no norm and no activation with them.
    """
    select = next(n for n in nodes if n.op == "select_rows")
    renamed = {select.outs[0]: select.ins[0]}
    kept = [Node(n.op, n.outs, tuple(renamed.get(i, i) for i in n.ins), n.attrs) for n in nodes if n is not select]
    return fuse(kept, RULES if size <= STREAMED_ROWS else BATCH_RULES)
