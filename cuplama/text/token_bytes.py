"""Tokens as the bytes that they add in the middle of a text, and text in the middle of a text as tokens.

A grammar is about bytes: a mask says which tokens continue them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from ..errors import PromptError
from .token_decoder import Pipeline, lone_bytes
from .tokenizer import Tokenizer

__all__ = ["TokenBytes"]

_BEFORE = "\n"  # a text before another: no vocabulary joins a line's end and a word in one token


class TokenBytes:
    """Of ids below ``size``: ``tokens``, the bytes of each, empty for ids without a token.

    hidden: ids that stand for no text, such as those that end one; special tokens are added to them. ``tokens`` has
    their spelling.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, hidden: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.hidden = frozenset(i for i in {*hidden, *tokenizer.special_ids} if i < size)
        middle = Pipeline(tokenizer.stages)
        middle.push("x")  # what the decoder does at the start of a text is now behind us
        self.tokens = [self._bytes_of(i, middle) for i in range(size)]

    def _bytes_of(self, id: int, middle: Pipeline) -> bytes:
        piece = self._tokenizer.piece(id)
        if piece is None or id in self.hidden:
            return (piece or "").encode()
        lone = lone_bytes(piece, self._tokenizer.stages)
        return (middle.push(piece) + middle.flush()).encode() if lone is None else lone

    def encode(self, text: str) -> list[int]:
        """The ids that the tokenizer gives this text in the middle of another, where none puts a space before it.

        They always spell the text, as far as the vocabulary can spell it.
        """
        for before in ("", _BEFORE):
            ids = self._encoded(before + text)
            at = len(self._encoded(before)) if before else 0
            if not any(i in self.hidden for i in ids[at:]) and self._spelled(ids[at:]) == text.encode():
                return ids[at:]
        return self._longest_first(text.encode())

    def _encoded(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, bos=False)
        except PromptError:  # a character that the vocabulary cannot spell
            return []

    def _spelled(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[i] if i < len(self.tokens) else b"\xff" for i in ids)

    def _longest_first(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            end = next((e for e in range(len(text), at, -1) if text[at:e] in self._ids), at)
            if end == at:
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens) if token and i not in self.hidden}
