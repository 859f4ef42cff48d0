"""The decoder of a tokenizer.json as a chain of stages that take one token at a time.

A piece is a token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`), and then what the stages make of it. Each
stage does what the `decode_chain` of the same name in `tokenizers` does to all pieces at once
(https://github.com/huggingface/tokenizers, tokenizers/src/decoders).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Pipeline", "Stage", "decoder_stages", "is_byte", "lone_bytes"]


def is_byte(piece: str) -> bool:
    """Whether a piece is sentencepiece's spelling of a byte, `<0x0A>`."""
    return _BYTE_TOKEN.fullmatch(piece) is not None


class Stage(Protocol):
    """One decoder: pieces in, pieces that are certain out."""

    def push(self, pieces: list[str]) -> list[str]:
        """What is certain now that these pieces have come."""
        ...

    def flush(self) -> list[str]:
        """The rest, at the end."""
        ...


class Pipeline:
    """The stages in a row: a piece in, the text that is certain out."""

    def __init__(self, stages: Iterable[Callable[[], Stage]]) -> None:
        self.stages = [make() for make in stages]

    def push(self, piece: str) -> str:
        """The text that is certain now that this piece has come."""
        pieces = [piece]
        for stage in self.stages:
            pieces = stage.push(pieces)
        return "".join(pieces)

    def flush(self) -> str:
        """The rest, at the end."""
        pieces: list[str] = []
        for stage in self.stages:
            pieces = stage.push(pieces) + stage.flush()
        return "".join(pieces)


class _Each:
    """A decoder that treats every piece alone; the first one may be special (a prefix space)."""

    def __init__(self, rest: Callable[[str], str], first: Callable[[str], str] | None = None) -> None:
        self._rest = rest
        self._first = first

    def push(self, pieces: list[str]) -> list[str]:
        if self._first is not None and pieces:
            first, self._first = self._first, None
            return [first(pieces[0]), *map(self._rest, pieces[1:])]
        return [self._rest(piece) for piece in pieces]

    def flush(self) -> list[str]:
        return []


class _ByteLevel:
    """GPT-2's byte alphabet: all pieces are bytes of one UTF-8 string, invalid ones U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, pieces: list[str]) -> list[str]:
        return [self._utf8.decode(_byte_level_bytes(piece)) for piece in pieces]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """Sentencepiece's `<0xXX>`: a whole run of them is UTF-8, or else every byte of the run is U+FFFD."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            byte = _BYTE_TOKEN.fullmatch(piece)
            if byte:
                self._run.append(int(byte[1], 16))
            else:
                out += [*self.flush(), piece]
        return out

    def flush(self) -> list[str]:
        run, self._run = self._run, bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _StripText:
    """Strip on the whole text: up to `start` leading occurrences of `char`."""

    def __init__(self, char: str, start: int) -> None:
        self._char = char
        self._start = start

    def push(self, pieces: list[str]) -> list[str]:
        text = "".join(pieces)
        while self._start and text:
            if text[0] != self._char:
                self._start = 0
                break
            self._start -= 1
            text = text[1:]
        return [text]

    def flush(self) -> list[str]:
        return []


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes for U+0100 onwards (GPT-2's encoder)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = count(0x100)
    return {chr(byte if byte in printable else next(stand_in)): byte for byte in range(256)}


_BYTE_OF = _byte_alphabet()


@lru_cache(maxsize=1 << 18)
def _byte_level_bytes(piece: str) -> bytes:
    # An added token may hold characters outside the alphabet; it then stands for itself.
    values = [_BYTE_OF.get(char) for char in piece]
    known = [value for value in values if value is not None]
    return bytes(known) if len(known) == len(values) else piece.encode()


def lone_bytes(piece: str, stages: Sequence[Callable[[], Stage]]) -> bytes | None:
    """The bytes of a piece that stands for bytes, or None for one that stands for characters."""
    if _ByteLevel in stages:
        return _byte_level_bytes(piece)
    if _ByteFallback in stages and (byte := _BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    return None


def decoder_stages(backend: tokenizers.Tokenizer) -> list[Callable[[], Stage]]:
    """A constructor for each stage of a tokenizer's decoder. Raises TokenizerError for one that cannot be streamed."""
    if backend.decoder is None:
        return [lambda: _Each(lambda piece: " " + piece, first=lambda piece: piece)]
    spec: dict[str, Any] = json.loads(backend.decoder.__getstate__())  # its part of tokenizer.json
    stages: list[Callable[[], Stage]] = []
    fused = False  # from here on the pieces are parts of one string
    for part in _flat(spec):
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and part["stop"] == 0:
            stages.append(_strip_text(part) if fused else _each(_strip_piece(part)))
        elif kind == "Replace" and (not fused or len(part["pattern"].get("String", "")) == 1):
            stages.append(_each(_replace(part)))
        elif kind == "Metaspace" and not fused:
            stages.append(_metaspace(part))
        elif kind == "ByteFallback" and not fused:
            stages.append(_ByteFallback)
        elif kind == "ByteLevel" and not fused:
            stages.append(_ByteLevel)
            fused = True
        else:
            raise TokenizerError(
                f"tokenizer.json: decoder {json.dumps(part, ensure_ascii=False)}{' after Fuse' if fused else ''} "
                "is not supported; supported are ByteLevel, ByteFallback, Metaspace, Replace, Strip (at the start), "
                "Fuse, and a Sequence of them"
            )
    return stages


def _flat(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flat(inner)]


def _each(change: Callable[[str], str]) -> Callable[[], Stage]:
    return lambda: _Each(change)


def _strip_text(part: Mapping[str, Any]) -> Callable[[], Stage]:
    return lambda: _StripText(part["content"], part["start"])


def _strip_piece(part: Mapping[str, Any]) -> Callable[[str], str]:
    return lambda piece: _StripText(part["content"], part["start"]).push([piece])[0]


def _metaspace(part: Mapping[str, Any]) -> Callable[[], Stage]:
    char = part["replacement"]
    # With a prefix scheme every replacement character of the first piece goes, not only the leading one.
    dropped = "" if part.get("prepend_scheme", "always") != "never" else " "
    return lambda: _Each(lambda piece: piece.replace(char, " "), first=lambda piece: piece.replace(char, dropped))


def _replace(part: Mapping[str, Any]) -> Callable[[str], str]:
    pattern, content = part["pattern"], part["content"]
    if "String" in pattern:
        return lambda piece: piece.replace(pattern["String"], content)
    import tokenizers
    from tokenizers import decoders

    # The regular expressions are Oniguruma's, which Python's `re` does not fully speak.
    decoder = decoders.Replace(tokenizers.Regex(pattern["Regex"]), content)
    return lambda piece: decoder.decode([piece])
