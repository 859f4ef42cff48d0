"""What may come next in a sequence: the engine's view of a grammar. ``cuplama/structured.py`` makes them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..errors import CuplamaError

__all__ = ["Constraint", "MaskWords", "mask_words"]

MaskWords = np.ndarray[Any, np.dtype[np.int32]]  # bit t % 32 of word t // 32 is set where token t may be drawn


def mask_words(vocab_size: int) -> int:
    """int32 words of a mask over so many tokens."""
    return -(-vocab_size // 32)


class Constraint(Protocol):
    """Which tokens may follow what a sequence has generated. It belongs to one sequence, and follows its tokens.

    Nothing here raises: what goes wrong is in ``error``, and the sequence fails with it.
    """

    @property
    def finished(self) -> bool:
        """Whether nothing may follow: the sequence ends, with "stop", even if it drew no stop token."""
        ...

    @property
    def error(self) -> CuplamaError | None:
        """Why the sequence cannot go on; then it is also finished, and what was drawn last means nothing."""
        ...

    def fill_mask(self, row: MaskWords) -> None:
        """Write what may be drawn next into a row [mask_words(V)] of a mask: one token at least."""
        ...

    def accept(self, token: int) -> None:
        """The sequence has drawn this token, which the last mask allowed."""
        ...
