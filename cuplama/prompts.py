"""What callers may give as a prompt, as text or plain token ids, alone or in a list.

A prompt is text, or a sequence or one-dimensional array of whole numbers. Several prompts are a sequence of those, or a
two-dimensional array. Anything else (bytes, sets, mappings, iterators, booleans as ids, arrays without dimensions) is
refused.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from .arguments import shown, type_of
from .errors import PromptError

__all__ = [
    "PlainPrompt",
    "Prompt",
    "Prompts",
    "TokenIds",
    "plain_prompt",
    "plain_prompts",
    "prompt_of_batch",
    "whole_ids",
]

TokenIds = Sequence[int] | np.ndarray[tuple[int], np.dtype[np.integer[Any]]]
Prompt = str | TokenIds
Prompts = Sequence[Prompt] | np.ndarray[tuple[int, int], np.dtype[np.integer[Any]]]
PlainPrompt = str | list[int]  # a prompt in Python's own types


def plain_prompts(prompt: Prompt | Prompts) -> tuple[list[PlainPrompt], bool]:
    """A list of prompts, and whether it was a single one. A list of numbers is one prompt, an empty list is none.

    Raises PromptError, which names the prompt of several by its number.
    """
    if isinstance(prompt, str) or not _holds_items(prompt):
        return [plain_prompt(prompt)], True
    if len(prompt) and _are_plain(prompt):
        return [whole_ids(prompt)], True
    if len(prompt) and not any(type(i) is not int and isinstance(i, (Sequence, np.ndarray)) for i in prompt):
        return [whole_ids(prompt)], True
    several: list[PlainPrompt] = []
    for item in prompt:
        with prompt_of_batch(len(several)):
            several.append(plain_prompt(item))
    return several, False


def plain_prompt(prompt: Any) -> PlainPrompt:
    """One prompt in Python's own types. Raises PromptError for what is neither text nor a list of token ids."""
    return prompt if isinstance(prompt, str) else whole_ids(prompt)


def whole_ids(ids: Any, wanted: str = "a prompt is text or a list of token ids") -> list[int]:
    """Plain ints from whole numbers of any kind, NumPy's too, but not from booleans. Raises PromptError.

    Of plain ints, which prompts of thousands of tokens are made of, only the type is looked at. wanted: a sentence for
    the error that is raised for what is no list.
    """
    if not _holds_items(ids):
        what = "an array without dimensions" if isinstance(ids, np.ndarray) else type_of(ids)
        raise PromptError(f"{wanted}, and not {what}")
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if _are_plain(ids):
        return list(ids)
    for id in ids:
        if type(id) is not int and (not isinstance(id, Integral) or isinstance(id, bool)):
            raise PromptError(f"a token id is a whole number; {shown(id, 40)} is {type_of(id)}")
    return [operator.index(id) for id in ids]


@contextlib.contextmanager
def prompt_of_batch(number: int | None) -> Iterator[None]:
    """Errors of a prompt name it by its number among several, counted from 0; None: there is only one."""
    try:
        yield
    except PromptError as e:
        if number is None:
            raise
        raise type(e)(f"prompt {number}: {e}") from None


def _are_plain(ids: Any) -> bool:
    """Whether all are Python's own ints; a prompt may have thousands, and this looks at each for 10 nanoseconds."""
    return set(map(type, ids)) <= {int}


def _holds_items(value: Any) -> bool:
    """Whether it is a list or something like it: its elements have an order, and it is neither text nor bytes."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
