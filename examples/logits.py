"""Look at the logits: what the model expects after every token of a text, and how sure it is."""

from __future__ import annotations

import numpy as np

import cuplama

TEXT = "The cat sat on the"


def main() -> None:
    with cuplama.load() as model:
        ids = model.encode(TEXT)
        logits = model.logits(ids)  # [n, vocab] float32: row i is about the token after ids[i]
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        for token, row in zip(ids, probabilities, strict=True):
            best = int(row.argmax())
            after, expected = model.tokenizer.token_text(token), model.tokenizer.token_text(best)
            print(f"after {after!r}: {expected!r} with probability {row[best]:.3f}")


if __name__ == "__main__":
    main()
