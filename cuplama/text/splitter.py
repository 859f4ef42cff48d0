"""An answer split into reasoning, content and tool calls while it streams. In use:

    form = model.tokenizer.answer_form
    splitter = Splitter(form, read_tools(tools), reasoning=form.is_reasoning(end_of_prompt))
    stream = model.astream(ids, show_special=model.tokenizer.special_in(form.texts))
    events = splitter.push(delta.text)    # of every delta, and at the end splitter.flush()

What could still become a tag is held back, and blanks next to a tag belong to it; content that goes on after a call
does so on a new line. What begins like a call and is none becomes content. A call whose arguments are JSON is passed on
as it comes; what the model then writes is its arguments, even if they turn out not to be JSON, or if the text ends
inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .answer_form import AnswerForm
from .tool_calls.events import (
    ArgumentsDelta,
    CallBegins,
    CallEnds,
    CallReader,
    ContentDelta,
    Event,
    MalformedCallError,
    Numbering,
    ReasoningDelta,
    Skipped,
)
from .tool_calls.tools import Tool

__all__ = [
    "ArgumentsDelta",
    "CallBegins",
    "CallEnds",
    "ContentDelta",
    "Event",
    "ReasoningDelta",
    "Skipped",
    "Splitter",
]


# Beginnings of calls that turn out to be none. After so many everything is content: each may cost another look at all
# the text that is left.
_MOST_FAILURES = 100


@dataclass(frozen=True)
class _Tag:
    """A text to watch for, and what is done where it comes.

    first: it counts only before any content. call: a call begins with it. kept: it is part of that call.
    """

    text: str
    found: Callable[[_Tag, str], list[Event]]
    first: bool = False
    call: bool = False
    kept: bool = False


class Splitter:
    """Takes the text of an answer in pieces and says what it is; how it was cut makes no difference to that.

    form: what the model writes. tools: by name; without any, calls are not looked for. reasoning: the answer begins
    inside the reasoning, because the prompt has its start tag.
    """

    def __init__(self, form: AnswerForm, tools: Mapping[str, Tool] | None = None, *, reasoning: bool = False) -> None:
        self._tools = dict(tools or {})
        self._calls = form.tools if self._tools else None
        self._numbering = Numbering(form.tools is not None and form.tools.short_ids)
        self._rest = ""  # text that has come and is not yet told apart
        self._reasoning = reasoning and form.reasoning is not None
        self._begun = False  # there was content, or a call
        self._blank = self._reasoning  # right after a tag, whose blanks are left out
        self._saying: type[ContentDelta | ReasoningDelta] | None = None  # what goes on here; None right after a tag
        self._said: set[type[ContentDelta | ReasoningDelta]] = set()
        self._reader: CallReader | None = None
        self._opening = ""  # what the model wrote before the body that is being read
        self._kept = False  # the body begins with the tag that was found
        self._failures = 0
        self._outside = self._tags_outside(form)
        self._inside = [_Tag(form.reasoning.end, self._end_reasoning)] if form.reasoning else []

    def _tags_outside(self, form: AnswerForm) -> list[_Tag]:
        tags: list[_Tag] = []
        if form.reasoning is not None:
            tags.append(_Tag(form.reasoning.start, self._start_reasoning, first=not form.reasoning.anywhere))
            tags += [_Tag(text, self._skip) for text in form.reasoning.skipped]
        if self._calls is not None:
            tags += [_Tag(text, self._start_call, call=True) for text in self._calls.starts]
            if self._calls.bare:
                first = not self._calls.bare_anywhere
                tags.append(_Tag(self._calls.bare, self._start_call, first=first, call=True, kept=True))
        return tags

    def push(self, text: str) -> list[Event]:
        """What is certain now that this text has come."""
        if not (self._outside or self._inside):  # most chats have nothing to split
            return [ContentDelta(text, text)] if text else []
        self._rest += text
        return self._run(last=False)

    def flush(self) -> list[Event]:
        """What was held back, at the end of the text."""
        return self._run(last=True)

    def _run(self, last: bool) -> list[Event]:
        events: list[Event] = []
        while self._rest or (last and self._reader is not None):
            step = self._read_call(last) if self._reader is not None else self._read_text(last)
            if step is None:
                break
            events += step
        return events

    def _take(self, length: int) -> str:
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def _read_text(self, last: bool) -> list[Event] | None:
        """One step outside a call. None: more text is needed."""
        if self._blank:
            blanks = self._take(len(self._rest) - len(self._rest.lstrip()))
            self._blank = not self._rest
            return [Skipped(blanks)] if blanks else []
        tags = self._inside if self._reasoning else self._outside
        lost = self._failures >= _MOST_FAILURES
        tags = [tag for tag in tags if not ((tag.first and self._begun) or (lost and tag.call))]
        at, tag = _find(tags, self._rest, last)
        text = self._rest[:at] if not tags or (tag is None and last) else self._rest[:at].rstrip()
        if tag is None or (tag.first and text):
            return [self._shown(self._take(len(text)))] if text else None
        events = [self._shown(self._take(len(text)))] if text else []
        before = self._take(at - len(text))
        return events + tag.found(tag, before + ("" if tag.kept else self._take(len(tag.text))))

    def _shown(self, text: str) -> Event:
        kind = ReasoningDelta if self._reasoning else ContentDelta
        joint = "\n" if kind in self._said and kind is not self._saying else ""
        self._saying, self._begun = kind, self._begun or kind is ContentDelta
        self._said.add(kind)
        return kind(joint + text, text)

    def _skip(self, tag: _Tag, source: str) -> list[Event]:
        self._blank, self._saying = True, None
        return [Skipped(source)]

    def _start_reasoning(self, tag: _Tag, source: str) -> list[Event]:
        self._reasoning = True
        return self._skip(tag, source)

    def _end_reasoning(self, tag: _Tag, source: str) -> list[Event]:
        self._reasoning = False
        return self._skip(tag, source)

    def _start_call(self, tag: _Tag, source: str) -> list[Event]:
        assert self._calls is not None
        self._opening, self._kept = source, tag.kept
        self._reader = self._calls.reader(self._tools, self._numbering, bare=tag.kept)
        return []

    def _read_call(self, last: bool) -> list[Event] | None:
        """One step inside a call, or after it, where its end tag is expected. None: more text is needed."""
        assert self._reader is not None
        if self._reader.done:
            return self._end_call(last)
        try:
            events, used = self._reader.read(self._rest, last)
        except MalformedCallError:
            return self._no_call()
        self._begun = True
        self._take(used)
        if events and self._opening:
            events[0] = replace(events[0], source=self._opening + events[0].source)
            self._opening = ""
        return events if events or self._reader.done else None

    def _end_call(self, last: bool) -> list[Event] | None:
        assert self._calls is not None
        end, found = self._calls.end, self._rest.lstrip()
        blanks = len(self._rest) - len(found)
        if end and not last and end != found and end.startswith(found):
            return None
        self._reader, self._blank, self._saying = None, True, None
        taken = self._take(blanks + len(end) if found.startswith(end) else 0)
        return [Skipped(taken)] if taken else []

    def _no_call(self) -> list[Event]:
        """The tag is content, and so is what follows it, unless another tag does."""
        self._failures += 1
        # A call that needs no tag is not looked for in what it began with.
        text = self._opening + (self._take(1) if self._kept else "")
        self._reader, self._opening = None, ""
        return [self._shown(text)]


def _find(tags: list[_Tag], text: str, last: bool) -> tuple[int, _Tag | None]:
    """(where the first tag is, the longest there), or (where the first tag may begin, None); the end if none may.

    last: nothing can be completed any more.
    """
    complete = [(at, -len(tag.text), tag) for tag in tags if (at := text.find(tag.text)) >= 0]
    at, _, found = min(complete, key=lambda one: one[:2], default=(len(text), 0, None))
    # Where a tag was found, a longer one may begin whose end is missing.
    begun = [place for tag in tags if (place := _overlap(text, tag.text)) <= at and place < len(text)]
    return (min(begun), None) if begun and not last else (at, found)


def _overlap(text: str, tag: str) -> int:
    """Where the longest end of `text` begins that is a beginning of `tag`, but not all of it."""
    places = range(max(0, len(text) - len(tag) + 1), len(text))
    return next((place for place in places if tag.startswith(text[place:])), len(text))
