"""Continue several prompts of different lengths in one batch. Every prompt gives what it gives alone."""

from __future__ import annotations

import cuplama

PROMPTS = ("The little dragon was", "One day, Lily and her cat went to the park and", "Tom was sad because")


def main() -> None:
    with cuplama.load() as model:
        for prompt, completion in zip(PROMPTS, model.generate(PROMPTS, max_tokens=20, seed=1), strict=True):
            print(prompt + completion.text)


if __name__ == "__main__":
    main()
