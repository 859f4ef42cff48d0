"""The tokens that begin and end documents, by what tokenizer and config say."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PromptError
from ..models.config import ModelConfig
from ..text.tokenizer import Tokenizer

__all__ = ["Marks"]


@dataclass(frozen=True)
class Marks:
    """prefix: what the tokenizer puts in front of a text, BOS for most that do; bos, eos: ids, or None; stops: ids that
    end an answer."""

    prefix: tuple[int, ...]
    bos: int | None
    eos: int | None
    stops: frozenset[int]

    @property
    def shared(self) -> bool:
        """Whether one token ends a document and begins the next, as GPT-2's ``<|endoftext|>`` does."""
        return self.eos is not None and self.bos == self.eos

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: ModelConfig, stops: frozenset[int] = frozenset()) -> Marks:
        """What the tokenizer names counts before what the config does, and of the config only ids of special tokens:
        a text must not be cut at each letter that happens to have such an id.

        stops: further ids that end an answer.
        """
        prefix, special = _prefix(tokenizer), tokenizer.special_ids
        named = [id for id in config.eos if id in special]
        bos = config.bos if tokenizer.bos is None and config.bos in special else tokenizer.bos
        eos = next(iter(named), None) if tokenizer.eos is None else tokenizer.eos
        if bos is None and prefix:
            bos = prefix[0]
        return cls(prefix, bos, eos, frozenset({*stops, *named, *([] if eos is None else [eos])}))


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids in front of those of a text's own."""
    try:
        plain, whole = tokenizer.encode("a", bos=False), tokenizer.encode("a")
    except PromptError:  # a vocabulary without this letter
        return tuple(tokenizer.encode("")[:1])
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:at])
