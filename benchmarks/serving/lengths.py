"""The requests of a load: how long prompts and answers are, and when they come.

Lengths are like those of ShareGPT, conversations of people with ChatGPT, as serving benchmarks sample them: first turns
whose prompt has 4 to 1024 tokens, and whose answer as well. Of 1,000 of them the prompts had 230 tokens on average and
the answers 203, by the tokenizer of Llama 3.1 (the output in github.com/vllm-project/vllm/pull/18566). Here both are
drawn from a lognormal distribution, rounded and clipped to 4 ... 1024, with medians that give these means. The spreads
(sigma 1.2 and 0.9) are a choice: prompts of people vary more than answers. Prompt and answer are independent.

Arrivals are a Poisson process: the time from one to the next is exponential, and nobody waits for an answer first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["ANSWERS", "PROMPTS", "Ask", "Lengths", "arrivals", "draw"]

SHORTEST, LONGEST = 4, 1024  # tokens


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution, clipped to ``SHORTEST`` ... ``longest``. median: in tokens; sigma: of the logarithm."""

    median: float
    sigma: float
    longest: int = LONGEST

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """So many lengths."""
        found = np.rint(rng.lognormal(np.log(self.median), self.sigma, count))
        lengths: list[int] = np.clip(found, min(SHORTEST, self.longest), self.longest).astype(int).tolist()
        return lengths


PROMPTS, ANSWERS = Lengths(130, 1.2), Lengths(139, 0.9)


@dataclass(frozen=True)
class Ask:
    """A request: the ids of its prompt, and how many tokens it wants."""

    prompt: list[int]
    new: int


def draw(rng: np.random.Generator, count: int, prompts: Lengths, answers: Lengths, vocab_size: int) -> list[Ask]:
    """So many requests, with prompts of random tokens."""
    lengths = zip(prompts.draw(rng, count), answers.draw(rng, count), strict=True)
    return [Ask(rng.integers(0, vocab_size, tokens).tolist(), new) for tokens, new in lengths]


def arrivals(rng: np.random.Generator, count: int, rate: float) -> list[float]:
    """When each of ``count`` requests is due, in seconds from now; ``rate`` come in a second on average."""
    due: list[float] = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    return due
