"""Prefill on a device that can record: passes of nearly the same size replay one recording.

Launching the kernels of a pass one by one takes the host milliseconds, longer than a short prompt takes the GPU. So
what comes before the head is recorded, for a number of rows and of sequences that a pass is filled up to. The head, a
few launches that depend on how many logits are asked for, is queued while the GPU is busy with the recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import Array
from .decode import batch_size
from .input_buffer import Packed
from .kv_cache import PAGE, pages_for

if TYPE_CHECKING:
    from .engine import Engine


__all__ = ["KEPT_CHUNKS", "PrefillPass", "PrefillPasses", "most_logits", "padded_rows"]

KEPT_CHUNKS = 2  # recordings are kept for as many rows in all as the largest pass has, times this
# (rows, step): up to so many rows, recordings are made for multiples of the step. Beyond 128, a tile of a matrix
# product, a smaller step would save little work.
_STEPS = ((64, 16), (128, 32), (512, 64))
_LAST_STEP = 128


def padded_rows(rows: int) -> int:
    """Rows of the recording that serves this many rows."""
    step = next((step for limit, step in _STEPS if rows <= limit), _LAST_STEP)
    return -(-rows // step) * step


def most_logits(vocab: int) -> int:
    """Rows of logits that a pass may make, where those of all tokens are asked for: 256 MB of them."""
    return max(1, (1 << 26) // vocab)


class _Inputs:
    """The inputs of a pass over ``rows`` new tokens of ``sequences`` sequences. Fewer of either are filled up.

    Rows that are left over belong to no sequence: they write to the cache's spare page, attention leaves them out, and
    whatever they hold reaches no other row. Sequences that are left over are empty.
    """

    def __init__(self, engine: Engine, rows: int, sequences: int) -> None:
        self._spare = engine.cache.spare
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("input_ids", "positions", "slot_mapping", "rope.rows", "logit_rows"), (rows,)
        )
        shapes |= {"cu_seqlens": (sequences + 1,), "seq_lens": (sequences,)}
        shapes |= {"page_table": (sequences, pages_for(engine.context))}
        self.packed = Packed(engine.backend, {name: np.zeros(shape, np.int32) for name, shape in shapes.items()})

    def send(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Array]:
        """Set them. Returns the device arrays by name; of "logit_rows" only what is."""
        rest = {"slot_mapping": self._spare * PAGE, "cu_seqlens": len(inputs["input_ids"]), "page_table": self._spare}
        for name, array in inputs.items():
            self.packed.put(name, array, rest.get(name, 0))
        self.packed.send()
        return {**self.packed.device, "logit_rows": self.packed.device["logit_rows"][: len(inputs["logit_rows"])]}


class PrefillPass:
    """A recorded pass over ``rows`` new tokens of ``sequences`` sequences, up to the head."""

    def __init__(self, engine: Engine, rows: int, sequences: int) -> None:
        self._engine, self.rows = engine, rows
        self._inputs = _Inputs(engine, rows, sequences)
        self._hidden: dict[str, Array] = {}
        self._captured = engine.backend.capture(self._body)

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Array]:
        """Queue the pass. Returns its inputs and its result by name; the next run overwrites both."""
        device = self._inputs.send(inputs)
        self._captured.replay()
        return {**device, **self._hidden}

    def _body(self) -> None:
        self._hidden = {}  # before memory for the new one is asked for
        self._hidden = self._engine.run_body(self._inputs.packed.device)

    def close(self) -> None:
        """Give back the recording and its memory."""
        self._hidden = {}
        self._captured.close()
        self._inputs.packed.close()


class PrefillPasses:
    """The passes of an engine, recorded if their size comes more than once.

    The first of a size is filled up as the recording will be: a product's sums may depend on its number of rows, and
    the same prompt must give the same logits every time.

    A recording has memory of its own for its activations, in proportion to its rows, so the rows of all are bounded:
    the one that was not used for longest makes room for a new one. A pass is queued as a whole, on one stream, before
    another can begin; so even streams that are open together share them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        largest = min(engine.backend.prefill_chunk, engine.cache.pages * PAGE)
        self._most_rows = KEPT_CHUNKS * padded_rows(largest)
        self._kept: dict[tuple[int, int], PrefillPass] = {}
        self._seen: set[tuple[int, int]] = set()

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Array] | None:
        """Queue a pass with these inputs, filled up to the next size; see ``PrefillPass.run``.

        The first time of a size may be the last, so it is not recorded. None for a pass that never is: it brings
        rotation tables of its own, or has too many rows to be kept.
        """
        sequences = batch_size(len(inputs["seq_lens"]))
        # More rows than sequences, because as many mean a decode step to the attention op.
        rows = padded_rows(max(len(inputs["input_ids"]), sequences + 1))
        size = (rows, sequences)
        if "rope.cos" in inputs or rows > self._most_rows:
            return None
        if size not in self._seen:
            self._seen.add(size)
            device = _Inputs(self._engine, rows, sequences).send(inputs)
            return {**device, **self._engine.run_body(device)}
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
        """Give back all recordings; every size counts as new."""
        for p in self._kept.values():
            p.close()
        self._kept.clear()
        self._seen.clear()
