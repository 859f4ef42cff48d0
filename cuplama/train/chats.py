"""Chats as what a model learns from: prompt and answer as it meets them when it answers, and which of it is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..text.tokenizer import Tokenizer
from .marks import Marks

__all__ = ["Chat", "chat_documents"]


@dataclass
class Chat:
    """A document: its ids, and for each whether predicting it is learned."""

    ids: list[int]
    learned: list[bool]


def chat_documents(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    marks: Marks,
) -> list[Chat]:
    """The documents of a chat, one for most. Only what the assistant says is learned, with the token that ends it.

    Each answer stands behind exactly the prompt that the template makes for it. Where a template prints an earlier
    answer otherwise once the chat has gone on, such as without its reasoning, a new document begins. Raises what
    ``Tokenizer.apply_chat`` raises.
    """
    found: list[Chat] = []
    for i, message in enumerate(messages if isinstance(messages, Sequence) else ()):
        if i == 0 or not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue  # what comes first answers nothing
        prompt = tokenizer.apply_chat(messages[:i], tools=tools, add_generation_prompt=True)
        whole = tokenizer.apply_chat(messages[: i + 1], tools=tools, add_generation_prompt=False)
        common = _common(prompt, whole)
        answer = _answer(tokenizer, whole[common:], marks)
        last = found[-1].ids if found else []
        if not found or whole[: len(last)] != last or common < len(last):
            found.append(Chat([], []))
        chat = found[-1]
        chat.learned += [False] * (common - len(chat.ids)) + [True] * len(answer)
        chat.ids += whole[len(chat.ids) : common] + answer
    if not found:  # also where there is nothing to learn, the messages are checked
        tokenizer.apply_chat(messages, tools=tools, add_generation_prompt=False)
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _answer(tokenizer: Tokenizer, ids: list[int], marks: Marks) -> list[int]:
    """What a template prints of an answer, up to the token that ends it; an EOS is that where the template has none."""
    for stops in (marks.stops, tokenizer.special_ids):
        for i, id in enumerate(ids):
            if id in stops and (stops is marks.stops or not tokenizer.decode(ids[i + 1 :], skip_special=True).strip()):
                return ids[: i + 1]
    return ids if marks.eos is None else [*ids, marks.eos]
