"""One answer, split as it comes: the events that its client wants to see, and what was counted meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from ..completion import Delta
from ..text.splitter import ArgumentsDelta, CallBegins, CallEnds, ContentDelta, Event, ReasoningDelta, Splitter

__all__ = ["SplitText"]


class SplitText:
    """Splits the deltas of one answer. reasoning: it is shown; several_calls: more than the first tool call are.

    reasoning_tokens: tokens that were reasoning; one whose text is held back counts as what came before it. called: a
    tool call was shown.
    """

    def __init__(self, splitter: Splitter, *, reasoning: bool = True, several_calls: bool = True) -> None:
        self._splitter, self._reasoning, self._several = splitter, reasoning, several_calls
        self._thinks = False
        self.reasoning_tokens = 0
        self.called = False

    def push(self, deltas: Iterable[Delta], *, last: bool = False) -> list[Event]:
        """What is certain now. last: nothing more comes, so nothing is held back."""
        found: list[Event] = []
        for delta in deltas:
            events = self._splitter.push(delta.text)
            found += events
            if events:
                self._thinks = any(isinstance(event, ReasoningDelta) for event in events)
            self.reasoning_tokens += self._thinks
        if last:
            found += self._splitter.flush()
        shown = [event for event in found if self._is_shown(event)]
        self.called = self.called or any(isinstance(event, CallBegins) for event in shown)
        return shown

    def _is_shown(self, event: Event) -> bool:
        if isinstance(event, ReasoningDelta):
            return self._reasoning
        if isinstance(event, (CallBegins, ArgumentsDelta, CallEnds)):
            return self._several or event.index == 0
        return isinstance(event, ContentDelta)
