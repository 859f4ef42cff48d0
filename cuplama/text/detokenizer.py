"""Token ids to text, one at a time: what ``decode`` of the whole would give, as soon as it is certain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from .token_decoder import Pipeline, is_byte
from .tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_END = 16  # tokens at each end of a context that are looked at, at least; an incomplete character has 3 bytes at most


class Detokenizer:
    """Turns ids into text one at a time, and never takes back or repeats a character.

    shown: special tokens that are not skipped.

    The pushes and the flush together are exactly `tokenizer.decode(ids)`, for any ids. After `context` (the prompt),
    they are what decode(context + ids) adds to decode(context), so the continuation of a sentencepiece prompt
    keeps its leading space; if the ids complete a character that the context left incomplete, that character is given.

    It runs the decoder of tokenizer.json as a chain of stages that each hold back only what a later token can still
    change: an incomplete UTF-8 character (byte-level), or a run of `<0xXX>` tokens, which decodes as a whole or
    not at all (byte fallback). The held-back part is therefore at most 3 bytes in the one case and the current run
    in the other, and a push costs the same however long the text is. `tokenizers.DecodeStream` instead guesses from
    U+FFFD in decoded text: it shows `A` for <0x41>, then fails on <0xFF>, and has no flush.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special: bool = True, shown: Iterable[int] = ()
    ) -> None:
        self._piece = tokenizer.piece
        self._hidden = tokenizer.special_ids.difference(shown) if skip_special else frozenset[int]()
        self._pipeline = Pipeline(tokenizer.stages)
        self._seen = ""  # of the text still held back, what the context's own decoding already shows
        if context:
            for id in self._ends_of(context):
                self.push(id)
            self._seen = copy.deepcopy(self._pipeline).flush()

    def _ends_of(self, context: Sequence[int]) -> Iterator[int]:
        """The tokens of a context that can still matter, for a push takes 3 microseconds: the first ones, which stages
        may treat in a way of their own, and the last ones, from one on that completes what came before it."""
        at = len(context) - _END
        while at > _END and not self._completes(context[at]):
            at -= 1
        if at <= _END:
            return iter(context)
        return chain(islice(context, _END), (context[i] for i in range(at, len(context))))

    def _completes(self, id: int) -> bool:
        """Whether a token ends a run of bytes: it shows, and is no byte."""
        piece = None if id in self._hidden else self._piece(id)
        return piece is not None and piece != "" and not is_byte(piece)

    def push(self, id: int) -> str:
        """The text that is certain now that token `id` has come; "" while a character is incomplete."""
        piece = None if id in self._hidden else self._piece(id)
        return "" if piece is None else self._unseen(self._pipeline.push(piece))

    def flush(self) -> str:
        """What is held back: incomplete bytes become U+FFFD. What is pushed after it does not complete them."""
        return self._unseen(self._pipeline.flush())

    def _unseen(self, text: str) -> str:
        # What a stage holds back it gives all at once, so the first text to come contains all of `_seen` or differs.
        if self._seen and text:
            text, self._seen = text.removeprefix(self._seen), ""
        return text
