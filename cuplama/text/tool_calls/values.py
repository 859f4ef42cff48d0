"""Values in the notations of models that do not write JSON: Python's literals, and Gemma's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["GEMMA", "PYTHON", "Notation", "Values"]

_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None, "none": None}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"[A-Za-z]+")
_BLANK = re.compile(r"\s*")
_DEEPEST = 100  # brackets inside one another
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_KEPT = "\"'\\/"


@dataclass(frozen=True)
class Notation:
    """How strings are written (group 1 or 2 of the expression), what they mean, and keys that need no quotes."""

    string: re.Pattern[str]
    meaning: Callable[[str], str]
    key: re.Pattern[str] | None = None


class Values:
    """Reads one value after the other from a text. at: where it is. Raises ValueError for what is none."""

    def __init__(self, text: str, notation: Notation) -> None:
        self.text, self.at, self._notation = text, 0, notation

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """What the pattern matches here, blanks before it left out, or None."""
        self.blank()
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[0]

    def blank(self) -> None:
        """Go past blanks."""
        found = _BLANK.match(self.text, self.at)
        assert found is not None
        self.at = found.end()

    def next_is(self, mark: str) -> bool:
        """Whether `mark` comes next; then it is taken."""
        self.blank()
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def expect(self, mark: str) -> None:
        """Take `mark`."""
        if not self.next_is(mark):
            raise ValueError(f"{mark!r} expected at character {self.at}")

    def at_end(self) -> bool:
        """Whether only blanks are left."""
        self.blank()
        return self.at == len(self.text)

    def value(self, depth: int = _DEEPEST) -> Any:
        """The value that comes next."""
        if not depth:
            raise ValueError("nested too deep")
        if self.next_is("["):
            return self.several("]", lambda: self.value(depth - 1))
        if self.next_is("{"):
            return self.pairs("}", ":", depth)
        if (string := self._string()) is not None:
            return string
        if (number := self.take(_NUMBER)) is not None:
            return int(number) if number.lstrip("+-").isdigit() else float(number)
        word = self.take(_WORD)
        if word not in _WORDS:
            raise ValueError(f"no value at character {self.at}")
        return _WORDS[word]

    def pairs(self, end: str, between: str, depth: int = _DEEPEST) -> dict[str, Any]:
        """key BETWEEN value, ... up to `end`."""

        def pair() -> tuple[str, Any]:
            key = self._string()
            if key is None and self._notation.key is not None:
                key = self.take(self._notation.key)
            if key is None:
                raise ValueError(f"no key at character {self.at}")
            self.expect(between)
            return key, self.value(depth - 1)

        return dict(self.several(end, pair))

    def several(self, end: str, read: Callable[[], Any]) -> list[Any]:
        """Items between commas, up to `end`; a comma may also follow the last."""
        found: list[Any] = []
        while not self.next_is(end):
            found.append(read())
            if not self.next_is(","):
                self.expect(end)
                break
        return found

    def _string(self) -> str | None:
        self.blank()
        found = self._notation.string.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return self._notation.meaning(next(group for group in found.groups() if group is not None))


def _unescaped(text: str) -> str:
    # Two halves of a character, as JSON escapes them, become that character.
    return _ESCAPE.sub(_meant, text).encode("utf-16", "surrogatepass").decode("utf-16")


def _meant(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) > 1:
        number = int(code[1:], 16)
        if number > 0x10FFFF:
            raise ValueError(f"no character {code}")
        return chr(number)
    return _ESCAPED.get(code, code if code in _KEPT else "\\" + code)


PYTHON = Notation(re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL), _unescaped)
GEMMA = Notation(re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL), str, re.compile(r"[^\s:{}\[\],<]+"))
