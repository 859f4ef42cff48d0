"""What the engine has done so far and is doing now, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(frozen=True)
class EngineStats:
    """running, waiting: sequences that have pages, or wait for them; pages, pages_used: of the cache, and those that
    running sequences hold. The others count from the beginning: steps; prompt_tokens, generated_tokens: read and drawn;
    prefix_queries, prefix_hits: tokens of prompts, and those of them that were found in the prefix cache; preemptions:
    sequences that lost their pages to older ones.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
