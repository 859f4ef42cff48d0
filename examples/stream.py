"""Print a story while it is being written, token by token."""

from __future__ import annotations

import cuplama

PROMPT = "Once upon a time"


def main() -> None:
    with cuplama.load() as model:
        print(PROMPT, end="", flush=True)
        for delta in model.stream(PROMPT, max_tokens=40, temperature=0.8, seed=1):
            print(delta.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
