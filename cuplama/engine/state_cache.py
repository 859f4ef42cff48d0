"""The second kind of cache: a slot for each sequence, with its state in the layers that have no keys and values.

A state is that of all tokens so far and cannot be cut. So that a beginning can be found again, a slot may hold the
state behind it, under the key that the page of its last tokens has (``prefix_cache.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..backends import Backend
from ..dtypes import DTYPES, Array
from ..models.config import ModelConfig

__all__ = ["PADDING_SLOT", "SPARE_SLOTS", "StateCache"]

PADDING_SLOT = 0  # belongs to no sequence: the rows that pad a batch write there
SPARE_SLOTS = 8  # beside those of running sequences: for states behind beginnings, while all others are taken


class StateCache:
    """The slots. ``arrays``: "<layer>.cache.conv" [slots + 1, K - 1, C] in the dtype of activations and
    "<layer>.cache.state" [slots + 1, heads, key size, value size] float32, for the layers with a gated delta rule.

    A slot belongs to nobody, to one sequence, or to a key. Keys lose theirs when others need them: the one that was not
    used for longest goes first. Copies are queued on the device, in order. A slot is never cleared, for a sequence that
    begins reads none of it.
    """

    def __init__(self, backend: Backend, config: ModelConfig, slots: int) -> None:
        self._backend, self.slots = backend, slots
        parts = (("conv", backend.dtype), ("state", DTYPES["f32"]))
        self.arrays: dict[str, Array] = {
            f"{i}.cache.{part}": backend.zeros((slots + 1, *shape), dtype)
            for i in config.delta_layers
            for (part, dtype), shape in zip(parts, config.state_shapes, strict=True)
        }
        self.clear()

    @property
    def free(self) -> int:
        """Slots that no sequence has."""
        return len(self._empty) + len(self._kept)

    def clear(self) -> None:
        """All slots are free, and none has a key."""
        self._empty = list(range(self.slots, 0, -1))
        self._kept: dict[bytes, int] = {}  # slots by their keys, the one that was not used for longest in front

    def begin(self, key: bytes | None = None) -> int:
        """A slot for a sequence, which holds the state that is kept under ``key``, if that is given. One must be free.
        A model without states has none to give: its sequences all have that of padding."""
        if not self.arrays:
            return PADDING_SLOT
        source = None if key is None else self._kept.pop(key)
        if source is not None and not self._empty and not self._kept:
            return source  # the last that is free: the key loses it
        if key is not None and source is not None:
            self._kept[key] = source
        slot = self._take()
        if source is not None:
            self._copy(source, slot)
        return slot

    def release(self, slot: int) -> int:
        """Take back the slot of a sequence. Returns that of none."""
        if slot != PADDING_SLOT:
            self._empty.append(slot)
        return PADDING_SLOT

    def keep(self, key: bytes, slot: int) -> None:
        """Keep the state that a sequence has now under a key, unless that has one or no slot is free."""
        if key not in self._kept and self.free:
            kept = self._take()
            self._kept[key] = kept
            self._copy(slot, kept)

    def kept(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys a state is kept behind: up to the last one that has a state, 0 if none has."""
        return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._kept), 0)

    def _take(self) -> int:
        return self._empty.pop() if self._empty else self._kept.pop(next(iter(self._kept)))

    def _copy(self, source: int, target: int) -> None:
        for array in self.arrays.values():
            self._backend.copy(array[target], array[source])
