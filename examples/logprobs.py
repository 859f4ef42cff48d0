"""Generate with log-probabilities: of every token that was drawn, and of the three most probable ones."""

from __future__ import annotations

import math

import cuplama

PROMPT = "Once upon a time, there was a"


def main() -> None:
    with cuplama.load() as model:
        completion = model.generate(PROMPT, max_tokens=8, temperature=1.0, seed=7, logprobs=3)
        for token in completion.logprobs or ():
            assert token.logprob is not None  # it was asked for
            best = ", ".join(f"{model.tokenizer.token_text(i)!r} {math.exp(p):.3f}" for i, p in token.top)
            drawn = model.tokenizer.token_text(token.id)
            print(f"{drawn!r} with probability {math.exp(token.logprob):.3f}; best: {best}")


if __name__ == "__main__":
    main()
