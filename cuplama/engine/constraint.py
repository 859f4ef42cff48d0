"""What may come next in a sequence: the engine's view of a grammar. ``cuplama/structured.py`` makes them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

__all__ = ["Constraint", "MaskWords", "mask_words"]

MaskWords = np.ndarray[Any, np.dtype[np.int32]]  # bit t % 32 of word t // 32 is set where token t may be drawn


def mask_words(vocab_size: int) -> int:
    """int32 words of a mask over so many tokens."""
    return -(-vocab_size // 32)


class Constraint(Protocol):
    """Which tokens may follow what a sequence has generated. It belongs to one sequence, and follows its tokens."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow: the sequence ends, with "stop", even if it drew no stop token."""
        ...

    def fill_mask(self, row: MaskWords) -> None:
        """Write what may be drawn next into a row [mask_words(V)] of a mask. Bits beyond V are not read."""
        ...

    def accept(self, token: int) -> None:
        """The sequence has drawn this token, which the last mask allowed."""
        ...
