"""The text of one sequence while it is generated: tokens to text, and the stop strings that end it."""

from __future__ import annotations

from functools import cached_property

from .completion import Delta
from .engine.sequence import SequenceState, Token
from .text.detokenizer import Detokenizer
from .text.stop_strings import StopStrings
from .text.tokenizer import Tokenizer

__all__ = ["OutputText"]


class OutputText:
    """The text side of one sequence: detokenises its tokens, watches for stop strings, and ends it at one.

    The engine may be tokens ahead of it, and may have ended the sequence by then. index: the prompt's
    place in a batch; text, tokens: all that came so far. Without a tokenizer there is no text.
    """

    def __init__(self, index: int, sequence: SequenceState, tokenizer: Tokenizer | None) -> None:
        self.index, self.sequence = index, sequence
        self._tokenizer = tokenizer
        asked = sequence.params.show_special
        special = frozenset[int]() if tokenizer is None else tokenizer.special_ids
        self._shown = (special if asked else frozenset()) if isinstance(asked, bool) else special.intersection(asked)
        self._stops = StopStrings(sequence.params.stop)
        # Where special tokens are not shown, stop strings are compared with them only if one of them asks for it.
        self._watched = frozenset[int]()
        if tokenizer is not None and any(map(tokenizer.spells_special, sequence.params.stop)):
            self._watched = special - self._shown
        self.text = ""
        self.tokens: list[Token] = []
        self._stopped = False

    @cached_property
    def _detokenizer(self) -> Detokenizer | None:
        """Made for the first token, while the GPU is at work: it looks at the prompt, which takes 0.1 ms."""
        if self._tokenizer is None:
            return None
        return Detokenizer(self._tokenizer, context=self.sequence.prompt, shown=self._shown)

    @property
    def finish_reason(self) -> str | None:
        """Why the text has ended; None while more may come."""
        if self._stopped:
            return "stop"
        reason = self.sequence.finish_reason  # read before the number of its tokens, which does not change after it
        return reason if self.sequence.error is None and len(self.tokens) >= self.sequence.generated else None

    def push(self, token: Token) -> Delta:
        """What a token that was drawn adds. A stop token adds no text; the last token also adds what was held back."""
        self.tokens.append(token)
        sequence, text, stopped = self.sequence, "", False
        reason = self.finish_reason
        if self._detokenizer is not None:
            if token.id in self._watched:
                text, stopped = self._push_watched(token.id)
            elif token.id not in sequence.stop_ids:
                text, stopped = self._stops.push(self._detokenizer.push(token.id))
            if not stopped and reason is not None:
                tail, stopped = self._stops.push(self._detokenizer.flush())
                text += tail if stopped else tail + self._stops.flush()
        if stopped:
            self._stopped = True
            sequence.finish_reason = reason = "stop"
        self.text += text
        return Delta(text, token, reason, self.index)

    def _push_watched(self, id: int) -> tuple[str, bool]:
        """A special token that may be part of a stop string: what is shown now, and whether one was hit.

        It ends a run of byte tokens, so what the detokenizer holds back comes before it.
        """
        assert self._tokenizer is not None
        assert self._detokenizer is not None
        text, stopped = self._stops.push(self._detokenizer.flush())
        if not stopped:
            more, stopped = self._stops.push(self._tokenizer.piece(id) or "", hidden=True)
            text += more
        return text, stopped
