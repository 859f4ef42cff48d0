"""Stop strings in streamed text: where the text ends, and what may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown now, whether a stop string was hit); after a hit there is no more text."""
        if self._hit:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._hit, self._held = True, ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
