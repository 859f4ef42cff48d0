"""What callers may give as a prompt, as lists of prompts and of token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from .errors import PromptError

__all__ = ["Prompt", "prompt_list", "whole_ids"]

Prompt = str | Sequence[int]  # text, or token ids


def prompt_list(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """A list of prompts, and whether it was a single one. A list of numbers is one prompt. Raises PromptError."""
    if isinstance(prompt, str):
        return [prompt], True
    several = isinstance(prompt, Iterable) and not isinstance(prompt, bytes)
    items = list(prompt) if several else [prompt]
    if several and items and all(isinstance(i, (int, np.integer)) for i in items):
        return [cast("list[int]", items)], True
    for i in items:
        if isinstance(i, bytes) or not isinstance(i, (Sequence, np.ndarray)):
            raise PromptError(f"a prompt is text or a list of token ids, not {type(i).__name__}")
    return cast("list[Prompt]", items), False


def whole_ids(prompt: Sequence[Any]) -> list[int]:
    """Plain ints from whole numbers of any kind, NumPy's too. Raises PromptError."""
    try:
        return [operator.index(t) for t in prompt]
    except TypeError:
        raise PromptError(f"a token id is a whole number; the prompt is {prompt!r:.60}") from None
