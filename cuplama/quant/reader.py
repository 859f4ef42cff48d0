"""What a reader of a quantised layout is: the names it answers to, its settings, and what it makes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .settings import Settings
from .tensor import Tensor

__all__ = ["Layout", "Reader"]


class Layout(Protocol):
    """The layout of one checkpoint: a reader with the settings filled in."""

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with each quantised matrix as one ``Stored`` tensor by the name of a plain one, "x.weight".

        Raises CheckpointError, one line that names file and tensor, what it is and what is expected.
        """


@dataclass(frozen=True)
class Reader:
    """A disk layout of quantised weights.

    methods: the names of it in ``quant_method``; open: its settings, checked, as a ``Layout``, or a ConfigError;
    beside: a file that holds the settings where config.json has none; signs: settings that, if true, say that it is
    this layout where no method is named.
    """

    methods: tuple[str, ...]
    open: Callable[[Settings], Layout]
    beside: str | None = None
    signs: tuple[str, ...] = ()
