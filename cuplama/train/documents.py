"""Files of text or JSON lines as a stream of tokens: where documents begin, and which tokens are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ParameterError, PromptError, TokenizerError
from ..files import not_opened
from ..text.tokenizer import Tokenizer
from .chats import chat_documents
from .marks import Marks
from .pieces import read_pieces

__all__ = ["BEGINS", "LEARNED", "Part", "Stream", "is_lines", "read_documents"]

BEGINS, LEARNED = np.uint8(1), np.uint8(2)
"""Bits of a token's flags: a document begins with it; predicting it is learned."""
_LINES = (".jsonl", ".ndjson")
_MANY = 16  # pieces or lines whose tokens are made at once, on several cores
Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
Flags = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Part:
    """Some tokens of the stream: their ids and flags, and how many bytes of the file they are."""

    ids: Ids
    flags: Flags
    size: int


def is_lines(path: Path) -> bool:
    """Whether a file holds JSON lines, by its name. Raises ParameterError for JSON that is not in lines."""
    if path.suffix.lower() == ".json":
        raise ParameterError(f"{path}: JSON is read in lines, an object with text or messages each, from *.jsonl")
    return path.suffix.lower() in _LINES


def read_documents(path: Path, tokenizer: Tokenizer, stream: Stream) -> Iterator[Part]:
    """The tokens of a file, part by part. stream: of all files that are one data set.

    A text file is one stream, in which special tokens that the text spells are themselves. Of JSON lines each with a
    ``text`` is a document, and ends with EOS; one with ``messages`` is a chat. A document begins with what the
    tokenizer puts in front of a text. Raises PromptError naming file and line.
    """
    yield from _lines(path, tokenizer, stream) if is_lines(path) else _text(path, tokenizer, stream)


class Stream:
    """Marks tokens, knowing which came before."""

    def __init__(self, marks: Marks) -> None:
        self.marks, self._previous = marks, -1

    def add(self, ids: Sequence[int] | Ids, size: int, first: bool) -> Part:
        """Tokens of a text. first: whether they begin a document, whatever they are."""
        marks, found = self.marks, np.asarray(ids, np.int64)
        prefix = np.array(marks.prefix, np.int64)
        if first and len(prefix) and found[:1].tolist() != [prefix[0]]:
            found = np.concatenate([prefix, found])
        if first and marks.shared and self._previous == marks.eos and found[:1].tolist() == [marks.eos]:
            found = found[1:]  # the separator is there
        before = np.concatenate([[self._previous], found])[: len(found)]
        if not marks.shared and marks.eos is not None and len(prefix):
            bare = np.flatnonzero((before == marks.eos) & (found != prefix[0]))
            found = np.insert(found, np.repeat(bare, len(prefix)), np.tile(prefix, len(bare)))
            before = np.concatenate([[self._previous], found])[: len(found)]
        if not len(found):
            return Part(found, np.zeros(0, np.uint8), size)
        ends = np.zeros(len(found), bool) if marks.eos is None else before == marks.eos
        begins = found == (-1 if marks.bos is None else marks.bos)
        if not marks.shared:
            begins |= ends
        begins[0] |= first and not (marks.shared and ends[0])
        self._previous = int(found[-1])
        return Part(found, _flags(begins, ~begins | (found == marks.eos if marks.shared else False)), size)

    def end(self) -> Part:
        """The EOS behind a document, unless it is there."""
        eos = self.marks.eos
        return self.add([] if eos is None or self._previous == eos else [eos], 0, False)

    def chat(self, ids: Sequence[int], learned: Sequence[bool], size: int) -> Part:
        """The tokens of a chat."""
        found = np.asarray(ids, np.int64)
        self._previous = -1  # whatever comes next begins by itself
        return Part(found, _flags(np.arange(len(found)) == 0, np.asarray(learned, bool)), size)


def _flags(begins: Any, learned: Any) -> Flags:
    return np.asarray(begins, np.uint8) * BEGINS | np.asarray(learned, np.uint8) * LEARNED


def _text(path: Path, tokenizer: Tokenizer, stream: Stream) -> Iterator[Part]:
    eos = stream.marks.eos
    pieces, first = read_pieces(path, tokenizer, None if eos is None else tokenizer.piece(eos)), True
    while some := list(islice(pieces, _MANY)):
        encoded = _encoded(tokenizer, [(str(path), text) for text, _ in some])
        for ids, (_, size) in zip(encoded, some, strict=True):
            yield stream.add(ids, size, first)
            first = False


def _encoded(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The ids of each text of (where it stands, text). Raises PromptError that says where."""
    try:
        return tokenizer.encode_many([text for _, text in texts])
    except PromptError:
        for where, text in texts:
            try:
                tokenizer.encode(text, bos=False)
            except PromptError as e:
                raise PromptError(f"{where}: {e}") from None
        raise


def _lines(path: Path, tokenizer: Tokenizer, stream: Stream) -> Iterator[Part]:
    try:
        with path.open("rb") as file:
            lines = ((i, line) for i, line in enumerate(file, 1) if line.strip())
            while some := list(islice(lines, _MANY * 16)):
                yield from _some_lines(path, some, tokenizer, stream)
    except OSError as e:
        raise PromptError(not_opened(path, e)) from None


def _some_lines(path: Path, lines: list[tuple[int, bytes]], tokenizer: Tokenizer, stream: Stream) -> Iterator[Part]:
    wheres = [f"{path}, line {i}" for i, _ in lines]
    found = [_object(where, line) for where, (_, line) in zip(wheres, lines, strict=True)]
    texts = [(where, d["text"]) for where, d in zip(wheres, found, strict=True) if "text" in d]
    encoded = iter(_encoded(tokenizer, texts))
    for where, (_, line), document in zip(wheres, lines, found, strict=True):
        if "text" in document:
            yield stream.add(next(encoded), len(line), True)
            yield stream.end()
        else:
            yield from _chat(where, document, tokenizer, stream, len(line))


def _chat(where: str, document: dict[str, Any], tokenizer: Tokenizer, stream: Stream, size: int) -> Iterator[Part]:
    try:
        chats = chat_documents(tokenizer, document["messages"], document.get("tools"), stream.marks)
    except (TokenizerError, ParameterError) as e:
        raise PromptError(f"{where}: {e}") from None
    if not chats:
        raise PromptError(f"{where}: no message of the assistant answers another, so there is nothing to learn")
    for i, chat in enumerate(chats):
        yield stream.chat(chat.ids, chat.learned, 0 if i else size)


def _object(where: str, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise PromptError(f"{where}: not valid UTF-8: byte 0x{line[e.start]:02x} at offset {e.start}") from None
    except (ValueError, RecursionError) as e:
        raise PromptError(f"{where}: not valid JSON: {e}") from None
    if not isinstance(found, dict) or ("text" in found) == ("messages" in found):
        raise PromptError(f"{where}: it must be an object with either text or messages")
    if "text" in found and not isinstance(found["text"], str):
        raise PromptError(f"{where}: text is a {type(found['text']).__name__}, not a string")
    return found
