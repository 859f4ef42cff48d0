"""Measure how well the model predicts a text: perplexity with its standard error, and bits per byte."""

from __future__ import annotations

import cuplama
from cuplama.lab.perplexity import perplexity

TEXT = (
    "Once upon a time, there was a little boy named Ben. Ben had a red ball. He loved to play with his ball in"
    " the park. One day, the ball rolled into the pond. Ben was sad. A big duck saw the ball and pushed it back to"
    " Ben. Ben was very happy. They played until the sun went down. From that day on, Ben and the duck were best"
    " friends."
)


def main() -> None:
    with cuplama.load() as model:
        result = perplexity(model, TEXT)
        print(f"perplexity {result.perplexity:.2f} ± {result.error:.2f} over {result.tokens} tokens")
        print(f"{result.bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
