"""Where a text in brackets ends, found piece by piece."""

from __future__ import annotations

import json
import re

__all__ = ["Brackets"]

_OUTSIDE = {quotes: re.compile(f"[][(){{}}{quotes}]") for quotes in ('"', "\"'")}
_INSIDE = {quote: re.compile(rf"[\\{quote}]") for quote in "\"'"}
_CONTROL = re.compile(r"[\x00-\x1f]")


class Brackets:
    """Follows JSON or Python text from its first bracket on and finds the one that closes it.

    quotes: characters that strings stand in. Kinds of brackets are not told apart: what does not fit is no JSON anyway.
    depth: of brackets that are open before the first piece.
    """

    def __init__(self, quotes: str = '"', depth: int = 0) -> None:
        self._outside, self._depth, self._quote, self._escaped = _OUTSIDE[quotes], depth, "", False

    def end(self, text: str) -> int:
        """The place after the bracket that closes the text, or -1 if that is not in this piece."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            found = (_INSIDE[self._quote] if self._quote else self._outside).search(text, at)
            if found is None:
                return -1
            at, char = found.end(), found[0]
            if self._quote:
                self._escaped = char == "\\"
                self._quote = self._quote if self._escaped else ""
            elif char in "\"'":
                self._quote = char
            else:
                self._depth += 1 if char in "[({" else -1
                if self._depth <= 0:
                    return at
        return -1

    def escaped(self, text: str) -> str:
        """JSON that goes on here, with control characters in its strings escaped: models write line breaks as they are.

        It is to be asked before ``end`` has seen the same piece.
        """
        if _CONTROL.search(text) is None:
            return text
        inside, escaped, found = bool(self._quote), self._escaped, []
        for char in text:
            if not inside or escaped:
                inside, escaped = inside or char == '"', False
            elif char in '\\"':
                inside, escaped = char == "\\", char == "\\"
            elif char < " ":
                char = json.dumps(char)[1:-1]
            found.append(char)
        return "".join(found)
