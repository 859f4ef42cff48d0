"""The decode loop on a device that can record: one recorded step, replayed per token.

All inputs of a step live in buffers that stay where they are, and the step's last op makes the next step's inputs from
the tokens it drew. So the host only replays the recording, a few steps ahead, and reads the tokens behind the device
from a ring in host memory. What it does with them may lag; what it shows may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import Array
from ..models.fusion import BATCH_RULES, RULES, fuse
from ..models.graph import LOGITS
from ..ops import OPS
from ..ops.linear import STREAMED_ROWS
from ..ops.node import Node
from .input_buffer import Packed
from .kv_cache import PAGE, block_table, pages_for

if TYPE_CHECKING:
    from .engine import Engine
    from .sampler import Sampler
    from .sequence import SequenceState


__all__ = ["AHEAD", "DecodeLoop", "batch_size", "decode_nodes"]

AHEAD = 3  # steps that may be in flight: enough to hide the host, few enough that a stop wastes little
# A recording is made for these numbers of sequences; a batch in between is filled up with idle rows.
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


def batch_size(sequences: int) -> int:
    """Rows of the recording that serves this many sequences."""
    return next((s for s in _SIZES if s >= sequences), -(-sequences // 32) * 32)


class DecodeLoop:
    """A recorded decode step for ``size`` sequences, with the optional inputs that ``sampler`` has.

    Idle rows decode into the cache's spare page.
    """

    def __init__(self, engine: Engine, size: int, sampler: Sampler) -> None:
        self._engine, self._backend, self.size = engine, engine.backend, size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("input_ids", "positions", "slot_mapping", "seq_lens", "rope.rows"), (size,)
        )
        shapes |= {"page_table": (size, pages_for(engine.context)), "step": (1,)}
        arrays = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        arrays["cu_seqlens"] = np.arange(size + 1, dtype=np.int32)
        arrays |= {name: np.zeros((size, *array.shape[1:]), array.dtype) for name, array in sampler.inputs.items()}
        self._inputs = Packed(engine.backend, arrays)
        self._sampler = sampler
        self._ring, self._device_ring = engine.backend.host_ring((AHEAD + 1, size))
        self._scores: tuple[Array, ...] = ()
        self._captured = engine.backend.capture(self._body)
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

    def begin(self, active: Sequence[SequenceState], sampler: Sampler) -> None:
        """Set the buffers for these sequences, whose last token has been drawn but not fed."""
        spare = self._engine.cache.spare
        table = block_table([s.pages for s in active])
        pos = np.array([len(s.tokens) - 1 for s in active])
        page = table[np.arange(len(active)), pos // PAGE]
        inputs = {
            "input_ids": np.array([s.tokens[-1] for s in active]),
            "positions": pos,
            "slot_mapping": page * PAGE + pos % PAGE,
            "seq_lens": pos + 1,
            "rope.rows": np.array([self._engine.rope_row(s) for s in active]),
            "page_table": table,
            "step": np.zeros(1),
        }
        idle = {"slot_mapping": spare * PAGE, "seq_lens": 1, "page_table": spare, "repetition": 1}
        for name, array in {**inputs, **sampler.inputs}.items():
            self._inputs.put(name, array, idle.get(name, 0))
        self._inputs.send()
        self._sampler = sampler
        self._events.clear()
        self._read = 0

    def close(self) -> None:
        """Drop the recording and the buffers."""
        self._captured.close()
        self._inputs.close()
        self._scores = ()

    def launch(self) -> None:
        """Queue one step."""
        self._events.append(self._captured.replay())

    def read(self) -> tuple[np.ndarray[Any, Any], ...]:
        """The tokens of the oldest step in flight, [size], once it is done; then the log-probabilities, if any."""
        self._events.pop(0).synchronize()
        tokens = self._ring[self._read % len(self._ring)].copy()
        self._read += 1
        return (tokens, *(self._backend.download(a) for a in self._scores))

    def _body(self) -> None:
        """One step, from the buffers to the buffers."""
        backend, inputs = self._backend, self._inputs.device
        values = {**self._engine.values, **inputs}
        logits = backend.run(self._engine.decode_nodes(self.size), values, (LOGITS,))[LOGITS]
        # "seq_lens" is the position of the token to draw: one more than that of the token just fed.
        tokens, *scores = self._sampler.draw(backend, inputs, logits, inputs["seq_lens"])
        self._scores = tuple(scores)
        state = [inputs[k] for k in ("input_ids", "positions", "slot_mapping", "seq_lens", "rope.rows")]
        backend.call(
            OPS["advance"], [*state, self._device_ring, inputs["step"], tokens, inputs["page_table"]], {"S": PAGE}
        )


def decode_nodes(nodes: Sequence[Node], size: int = 1) -> list[Node]:
    """The node list of a decode step of ``size`` sequences: every row is wanted, and what pays when fused is.

    Beyond a few rows products go to a library, which takes no norm and no activation with them.
    """
    select = next(n for n in nodes if n.op == "select_rows")
    renamed = {select.outs[0]: select.ins[0]}
    kept = [Node(n.op, n.outs, tuple(renamed.get(i, i) for i in n.ins), n.attrs) for n in nodes if n is not select]
    return fuse(kept, RULES if size <= STREAMED_ROWS else BATCH_RULES)
