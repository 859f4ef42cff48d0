"""Stop strings in streamed text: where the text ends, and what may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts streamed text at the first stop string, holding back only what may still become one.

    First means completed first, as if the text came character by character (of two that end together, the longer), so
    the shown text does not depend on how the text was split on its way here.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop strings must be a list of non-empty strings, not {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self._visible: list[bool] = []  # for each character held back, whether it is shown in the end
        self._hit = False

    def push(self, text: str, *, hidden: bool = False) -> tuple[str, bool]:
        """(text that can be shown now, whether a stop string was hit); after a hit there is no more text.

        hidden: `text` counts for stop strings and is never shown: that of a special token.
        """
        if not self._stops:  # which is most of the time
            return ("" if hidden else text), False
        if self._hit:
            return "", True
        self._visible += [not hidden] * len(text)
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            shown = self._shown(text, min(found)[1])
            self._hit, self._held, self._visible = True, "", []
            return shown, True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        return self._shown(text, len(text) - keep), False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._shown(self._held, len(self._held))

    def _shown(self, text: str, end: int) -> str:
        """The visible characters of `text` up to `end`; the rest is held back."""
        shown = "".join(compress(text[:end], self._visible))
        self._held, self._visible = text[end:], self._visible[end:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
