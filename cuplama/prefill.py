"""Prefill on a device that can record: passes of nearly the same size replay one recording.

Launching the kernels of a pass one by one takes the host milliseconds, longer than a short prompt takes the GPU. So
what comes before the head is recorded, for a number of rows and of sequences that a pass is filled up to. The head, a
few launches that depend on how many logits are asked for, is queued while the GPU is busy with the recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import PAGE, pages_for
from .decode import batch_size
from .op import Array
from .packed import Packed

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["KEPT_CHUNKS", "PrefillPass", "PrefillPasses", "padded_rows"]

KEPT_CHUNKS = 2  # recordings are kept for as many rows in all as the largest pass has, times this

# (rows, step): up to so many rows, recordings are made for multiples of the step. Beyond 128, a tile of a matrix
# product, a smaller step would save little work.
_STEPS = ((64, 16), (128, 32), (512, 64))
_LAST_STEP = 128


def padded_rows(rows: int) -> int:
    """Rows of the recording that serves this many rows."""
    step = next((step for limit, step in _STEPS if rows <= limit), _LAST_STEP)
    return -(-rows // step) * step


class PrefillPass:
    """A recorded pass over ``rows`` new tokens of ``sequences`` sequences, up to the head.

    Fewer of either are filled up. Rows that are left over belong to no sequence: they write to the cache's spare page,
    attention leaves them out, and whatever they hold reaches no other row. Sequences that are left over are empty.
    """

    def __init__(self, engine: Engine, rows: int, sequences: int) -> None:
        self._engine, self.rows = engine, rows
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("ids", "pos", "slots", "rope.rows", "wanted"), (rows,))
        shapes |= {"starts": (sequences + 1,), "lengths": (sequences,)}
        shapes |= {"blocks": (sequences, pages_for(engine.context))}
        self._inputs = Packed(engine.backend, {name: np.zeros(shape, np.int32) for name, shape in shapes.items()})
        self._hidden: dict[str, Array] = {}
        self._recording = engine.backend.recording(self._body)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Array]:
        """Queue the pass. Returns its inputs and its result by name; the next run overwrites both."""
        spare = self._engine.cache.spare
        rest = {"slots": spare * PAGE, "starts": len(inputs["ids"]), "blocks": spare}
        for name, array in inputs.items():
            self._inputs.put(name, array, rest.get(name, 0))
        self._inputs.send()
        self._recording.run()
        device = self._inputs.device
        return {**device, "wanted": device["wanted"][: len(inputs["wanted"])], **self._hidden}

    def _body(self) -> None:
        self._hidden = {}  # before memory for the new one is asked for
        self._hidden = self._engine.run_body(self._inputs.device)

    def close(self) -> None:
        """Give back the recording and its memory."""
        self._hidden = {}
        self._recording.close()
        self._inputs.close()


class PrefillPasses:
    """The recorded passes of an engine, of sizes that came more than once.

    Each has memory of its own for its activations, in proportion to its rows, so the rows of all are bounded: the one
    that was not used for longest makes room for a new one. A pass is queued as a whole, on one stream, before another
    can begin; so even streams that are open together share them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        largest = min(engine.backend.prefill_chunk, engine.cache.pages * PAGE)
        self._most_rows = KEPT_CHUNKS * padded_rows(largest)
        self._kept: dict[tuple[int, int], PrefillPass] = {}
        self._seen: set[tuple[int, int]] = set()

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Array] | None:
        """Queue a recorded pass with these inputs of a pass; see ``PrefillPass.run``. None if it is not to be recorded.

        That is so the first time of a size, which may be the last; and if the pass brings rotation tables of its own,
        or has too many rows to be kept.
        """
        sequences = batch_size(len(inputs["lengths"]))
        # More rows than sequences, because as many mean a decode step to the attention op.
        rows = padded_rows(max(len(inputs["ids"]), sequences + 1))
        size = (rows, sequences)
        if "rope.cos" in inputs or rows > self._most_rows:
            return None
        if size not in self._seen:
            self._seen.add(size)
            return None
        chosen = self._kept.pop(size, None)
        if chosen is None:
            while self._kept and rows + sum(p.rows for p in self._kept.values()) > self._most_rows:
                oldest = next(iter(self._kept))
                self._kept.pop(oldest).close()
                self._seen.remove(oldest)
            chosen = PrefillPass(self._engine, rows, sequences)
        try:
            values = chosen.run(inputs)
        except BaseException:
            chosen.close()
            raise
        self._kept[size] = chosen  # now the last to go
        return values

    def close(self) -> None:
        """Give back all recordings."""
        for p in self._kept.values():
            p.close()
        self._kept.clear()
