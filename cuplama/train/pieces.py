"""A long text in pieces that have, each alone, the tokens that they have in the whole.

A tokenizer of a text of a gigabyte at once takes tens of gigabytes, and one core. A text can be cut where a tokenizer
cuts it anyway, and where that is differs between tokenizers: so the tokens around a cut are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..errors import PromptError
from ..files import not_opened
from ..text.tokenizer import Tokenizer

__all__ = ["read_pieces"]

_SIZE = 1 << 17  # characters of a piece
_LOOK = 1 << 14  # characters in which a place to cut is looked for
_AROUND = 256  # characters before and after a cut whose tokens must not depend on it
_TRIES = 16  # places that are looked at
_BOUNDARY = re.compile(r"(?<=\w)(?=\s)")


def read_pieces(path: Path, tokenizer: Tokenizer, separator: str | None) -> Iterator[tuple[str, int]]:
    """The text of a file in pieces, with the bytes that each has in it.

    separator: the text of a token behind which a piece may end. Where no cut leaves the tokens as they are, as with
    tokenizers that put a space in front of every text, a piece is as long as it must be. Raises PromptError naming the
    file, and the byte of what is not UTF-8.
    """
    held, least = "", _SIZE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while block := file.read(_SIZE):
                held += block
                if len(held) < least + _LOOK:
                    continue
                cut = _cut(held, tokenizer, separator)
                if cut is None:
                    least = 2 * len(held)
                    continue
                piece, held, least = held[:cut], held[cut:], _SIZE
                yield piece, len(piece.encode())
        if held:
            yield held, len(held.encode())
    except OSError as e:
        raise PromptError(not_opened(path, e)) from None
    except UnicodeDecodeError:
        raise PromptError(_not_text(path)) from None


def _cut(text: str, tokenizer: Tokenizer, separator: str | None) -> int | None:
    """A place near the end of the text where a cut changes no token, or None."""
    begin, end = max(0, len(text) - _LOOK), len(text) - _AROUND
    behind = re.compile(re.escape(separator)).finditer(text, begin, end) if separator else ()
    places = [m.end() for m in islice(behind, _TRIES)] + [m.start() for m in _boundaries(text, begin, end)]
    for place in places:
        before, after = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
        parts = [tokenizer.encode(part, bos=False) for part in (before, after, before + after)]
        if parts[0] + parts[1] == parts[2]:
            return place
    return None


def _boundaries(text: str, begin: int, end: int) -> Iterator[re.Match[str]]:
    """Places between a word and a blank, where most tokenizers cut."""
    return islice(_BOUNDARY.finditer(text, begin, end), _TRIES)


def _not_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        return f"{path} is not valid UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}"
    return f"{path} is not valid UTF-8"
