"""Writes a grammar in llguidance's form of Lark, rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...output_form import JSON_STYLE

__all__ = ["Lark"]

_TERMS = """\
BLANK: /[ \\n]{1,2}/
TEXT: /(?s:.*)/
"""


class Lark:
    """Rules of a grammar. special: text of each special token -> its id: such a token is no text to a grammar."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        names = sorted(special, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._rules: list[str] = []

    def rule(self, body: str, options: str = "") -> str:
        """A new rule; its name is given back. options: in brackets, as llguidance has them."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def text(self, text: str) -> str:
        """A literal text, in which special tokens stand for themselves."""
        parts, at = [], 0
        for token in self._tokens.finditer(text):
            parts += [json.dumps(text[at : token.start()]), f"<[{self._special[token[0]]}]>"]
            at = token.end()
        return " ".join(part for part in [*parts, json.dumps(text[at:])] if part != '""')

    def up_to(self, end: str) -> str:
        """Any text, and then `end`, which is not in it."""
        if end in self._special:
            return f"TEXT {self.text(end)}"  # no special token is a part of TEXT
        return self.rule(f"TEXT {json.dumps(end)}", "[lazy]")

    def json(self, schema: Mapping[str, Any], *, lenient: bool) -> str:
        """JSON that follows a schema. lenient: what llguidance does not know of JSON schema is left out."""
        own = schema.get("x-guidance")
        style = {**JSON_STYLE, "lenient": lenient, **(own if isinstance(own, Mapping) else {})}
        return self.rule(f"%json {json.dumps({**schema, 'x-guidance': style})}")

    def one_of(self, bodies: Iterable[str]) -> str:
        """One of several."""
        found = list(bodies)
        return found[0] if len(found) == 1 else self.rule(" | ".join(found))

    def between(self, item: str, separator: str, several: bool) -> str:
        """An item, or several with a separator between them."""
        return f"{item} ({separator} {item})*" if several else item

    def in_order(self, items: Sequence[tuple[str, bool]], separator: str) -> str:
        """Items (what, whether it must be there) in this order, with a separator between those that are there."""
        first, later = self.rule('""'), self.rule('""')
        for body, needed in reversed(items):
            skip_first, skip_later = ("", "") if needed else (f" | {first}", f" | {later}")
            first, later = (
                self.rule(f"{body} {later}{skip_first}"),
                self.rule(f"{separator} {body} {later}{skip_later}"),
            )
        return first

    def grammar(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules, _TERMS])
