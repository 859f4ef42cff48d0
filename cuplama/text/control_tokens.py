"""Control tokens told apart from text that is spelled like one, so that nothing typed in a message controls the model.

A chat template prints control tokens and the caller's text into one string. Before it runs, every place in the
caller's strings that spells a control token gets another first character, a private one (Unicode's private use area)
of the same length. In the rendered text a tokenizer then finds the template's own control tokens alone. They are
replaced by stand-ins, the private characters by the real ones, and the whole text is encoded once by a second
tokenizer: the same in all but that it knows the stand-ins instead of the control tokens. So normalizer,
pre-tokenizer and the flags of added tokens work across the borders of messages as they do in any other text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .encoding import encoding

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ControlTokens", "Disguised", "private_characters"]

# What a mark of a turn looks like: a word in some kind of brackets. Blanks may be added tokens as well.
_MARK = re.compile(r"[^\w\s].*\w.*[^\w\s]")


class ControlTokens:
    """A tokenizer's control tokens.

    Those are the added tokens that are flagged special or named by the folder (BOS, EOS, ...), and, in all that an
    assistant has not said, those that the template puts around the turns of a chat: some models' marks of a turn are
    not flagged (DeepSeek's distilled models). Other added tokens (`<think>`, `<tool_call>`) are what a model says, and
    an assistant's earlier messages hold them rightly. In what a tool returns, those that the template prints where a
    tool is called count as well: a web page must not close its own `<tool_response>`.

    named: texts of the tokens that the folder names; turns: the text of a harmless chat; tool_turns: that of one in
    which a tool is called.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, named: Iterable[str] = (), turns: str = "", tool_turns: str = ""
    ) -> None:
        self._backend = backend
        added = {id: token for id, token in backend.get_added_tokens_decoder().items() if token.content}
        names = set(named)
        own = {id: token.content for id, token in added.items() if token.special or token.content in names}
        marks = {id: token.content for id, token in added.items() if _MARK.fullmatch(token.content)}
        given = own | {id: text for id, text in marks.items() if text in turns}
        self._texts = given | {id: text for id, text in marks.items() if text in tool_turns}
        self._given = _Spelling(given.values())
        self._of_role = {"assistant": _Spelling(own.values()), "tool": _Spelling(self._texts.values())}
        self._plain: _PlainTokenizer | None = None

    def disguise(
        self, messages: Sequence[dict[str, Any]], values: Mapping[str, Any], template: str
    ) -> Disguised | None:
        """Messages and variables of a template in which no control token is spelled; None if none is.

        template: its source, whose characters the private ones must differ from.
        """
        spellings = [self._of_role.get(message["role"], self._given) for message in messages]
        found = any(spelling.occurs_in(m) for spelling, m in zip(spellings, messages, strict=True))
        if not found and not self._given.occurs_in(dict(values)):
            return None
        firsts = sorted({text[0] for text in self._texts.values()})
        avoid = "\0".join([template, *_strings([*messages, dict(values)])])
        private = dict(zip(firsts, private_characters(len(firsts), avoid), strict=True))
        hidden = [spelling.hide(m, private) for spelling, m in zip(spellings, messages, strict=True)]
        return Disguised(hidden, self._given.hide(dict(values), private), private)

    def encode(self, text: str, disguised: Disguised) -> list[int]:
        """The ids of a text rendered from what was disguised; only what is not disguised is a control token.

        Raises TokenizerError if the tokenizer makes control tokens of plain characters as well.
        """
        if self._plain is None:
            self._plain = _PlainTokenizer(self._backend, self._texts)
        found = encoding(self._backend, text)
        parts, end = [], 0
        for id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            written = text[start:stop]  # with the blanks that some tokens swallow
            if self._is_written(id, written):
                stand_in = self._plain.stand_ins[id]
                parts += [disguised.reveal(text[end:start]), written.replace(self._texts[id], stand_in)]
                end = stop
        ids = self._plain.encode("".join([*parts, disguised.reveal(text[end:])]))
        if self._drawn(ids) != self._drawn(found.ids):  # as where the model has one among its own pieces
            raise TokenizerError(
                "this tokenizer cannot spell the control tokens in the messages as text; "
                "special_text=True lets them be control tokens"
            )
        return ids

    def _is_written(self, id: int, text: str) -> bool:
        """Whether a token is a control token that its text spells: models also draw <unk> for other text."""
        return id in self._texts and self._texts[id] in text

    def _drawn(self, ids: Iterable[int]) -> list[int]:
        """The control tokens among ids, but for the one that the model draws for what it has no token for."""
        unknown = getattr(self._backend.model, "unk_token", None)
        return [id for id in ids if self._texts.get(id, unknown) != unknown]


@dataclass(frozen=True)
class Disguised:
    """Messages and variables that spell no control token. private: first character of a token -> what stands for it."""

    messages: list[dict[str, Any]]
    values: dict[str, Any]
    private: Mapping[str, str]

    def reveal(self, text: str) -> str:
        """The text with the real characters, also where a filter has escaped the private ones (`\\ue000`)."""
        for real, private in self.private.items():
            text = text.replace(private, real).replace(_escaped(private), real)
        return text


class _Spelling:
    """Finds texts in strings, and changes their first characters. texts: of control tokens."""

    def __init__(self, texts: Iterable[str]) -> None:
        either = "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"
        self._one = re.compile(either)
        self._every = re.compile(f"(?={either})")  # the lookahead finds a token at every place, overlapping ones too

    def occurs_in(self, value: Any) -> bool:
        """Whether a string in `value` (dicts, lists, ...) spells one of the texts."""
        return any(self._one.search(text) for text in _strings(value))

    def hide(self, value: Any, private: Mapping[str, str]) -> Any:
        """A copy of `value` whose strings spell none of the texts; their lengths stay."""
        if isinstance(value, str):
            return self._hide_text(value, private)
        if isinstance(value, dict):
            return {self._hide_text(key, private): self.hide(item, private) for key, item in value.items()}
        if not isinstance(value, list):
            return value
        items = [self.hide(item, private) for item in value]
        if _are_parts(items):  # a token that is cut in two by the border of two parts must not come together again
            ends = [0, *accumulate(len(part["text"]) for part in items)]
            joined = self._hide_text("".join(part["text"] for part in items), private)
            items = [{**part, "text": joined[a:b]} for part, (a, b) in zip(items, pairwise(ends), strict=True)]
        return items

    def _hide_text(self, text: str, private: Mapping[str, str]) -> str:
        characters = list(text)
        for match in self._every.finditer(text):
            characters[match.start()] = private[text[match.start()]]
        return "".join(characters)


class _PlainTokenizer:
    """A tokenizer without control tokens. `stand_ins`: id -> text that no message can hold and that becomes this id.

    It shares the model with the original one. The stand-ins have the flags of what they stand for.
    """

    def __init__(self, backend: tokenizers.Tokenizer, controls: dict[int, str]) -> None:
        import tokenizers

        self._plain = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        secret = os.urandom(8).hex()  # unknown to whoever writes a message
        added = backend.get_added_tokens_decoder()
        self.stand_ins = {id: f"\U000f0000{secret}:{id}\U000f0000" for id in controls}
        names = {id: self.stand_ins.get(id, token.content) for id, token in added.items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        self._plain.add_tokens(
            [
                tokenizers.AddedToken(names[id], special=False, **{flag: getattr(token, flag) for flag in flags})
                for id, token in added.items()
            ]
        )
        self._real = {self._plain.token_to_id(name): id for id, name in names.items() if name}

    def encode(self, text: str) -> list[int]:
        """The ids of a text with stand-ins."""
        return [self._real.get(id, id) for id in encoding(self._plain, text).ids]


def private_characters(count: int, avoid: str) -> list[str]:
    """Characters of Unicode's private use area that do not occur in `avoid`, nor their escapes (`\\ue000`)."""
    free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in avoid and _escaped(c) not in avoid)
    return list(islice(free, count))


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _are_parts(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in items)


def _strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included; the texts of content parts also as one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        if _are_parts(value):
            yield "".join(part["text"] for part in value)
        for item in value:
            yield from _strings(item)
