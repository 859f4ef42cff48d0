"""Log-probabilities as clients read them: OpenAI's form for chats, its older one for completions, and vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..engine.sequence import Token
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import Tokenizer

__all__ = ["LegacyLogprobs", "Spelling", "chat_logprobs", "prompt_logprobs"]

_LEAST = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have


class Spelling:
    """How tokens are written in log-probabilities: as text, or as "token_id:ID"."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self.tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, id: int) -> str:
        """The token's text in the middle of others, or its id."""
        return f"token_id:{id}" if self._as_ids else self.tokenizer.token_text(id)

    def entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        """A token as it stands in a chat's log-probabilities. bytes: its UTF-8, which may be a part of a character."""
        data = list(self.tokenizer.token_bytes(id))
        return {"token": self.text(id), "logprob": _finite(logprob), "bytes": data}


def chat_logprobs(spelling: Spelling, tokens: Iterable[Token]) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat."""
    content = [
        {**spelling.entry(t.id, t.logprob), "top_logprobs": [spelling.entry(*pair) for pair in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """``choices[].logprobs`` of one completion, piece by piece. Offsets count characters from the text's beginning.

    context: ids of what stands before the text: the prompt, unless it is part of the text (echo). skip_special: whether
    special tokens are left out of the text, so that they have no length there.
    """

    def __init__(self, spelling: Spelling, context: Sequence[int] = (), skip_special: bool = True) -> None:
        self._spelling, self._offset = spelling, 0
        self._text = Detokenizer(spelling.tokenizer, context=context, skip_special=skip_special)

    def push(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """The lists for the next tokens. Without a log-probability, as the first of a prompt, there is null."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            found["tokens"].append(self._spelling.text(token.id))
            found["token_logprobs"].append(None if token.logprob is None else _finite(token.logprob))
            found["top_logprobs"].append(None if token.logprob is None else self._best(token))
            found["text_offset"].append(self._offset)
            self._offset += len(self._text.push(token.id))
        return found

    def _best(self, token: Token) -> dict[str, float]:
        """Text -> log-probability of the best tokens and the token itself. Of two with one text, the better counts."""
        best: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            best.setdefault(self._spelling.text(id), _finite(logprob))
        return best


def prompt_logprobs(
    spelling: Spelling, tokens: Sequence[Token | None] | None, most: int
) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each token of the prompt id -> logprob, rank and text, and null for the first.

    most: how many of the best. The rank is null for a token that is not among them.
    """
    if tokens is None:
        return None
    return [None if t is None else _ranked(spelling, replace(t, top=t.top[:most])) for t in tokens]


def _ranked(spelling: Spelling, token: Token) -> dict[str, Any]:
    ranks = {id: (logprob, rank) for rank, (id, logprob) in enumerate(token.top, 1)}
    entries = {token.id: (token.logprob, None), **ranks}
    return {
        str(id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": spelling.text(id)}
        for id, (logprob, rank) in entries.items()
    }


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
