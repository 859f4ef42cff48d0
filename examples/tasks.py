"""Tasks of asyncio share one model and one batch: each prints its story when it is done."""

from __future__ import annotations

import asyncio

import cuplama

PROMPTS = ("The little dragon was", "One day, Lily and her cat went to the park and", "Tom was sad because")


async def story(model: cuplama.Model, prompt: str, tokens: int) -> None:
    stream = model.astream(prompt, max_tokens=tokens, seed=1)
    text = "".join([delta.text async for delta in stream])
    print(prompt + text)


async def main() -> None:
    with cuplama.load(cache_tokens="auto") as model:  # room for many texts
        lengths = (30, 20, 10)  # the last is done first: nobody waits for the end of a batch
        await asyncio.gather(*(story(model, prompt, n) for prompt, n in zip(PROMPTS, lengths, strict=True)))


if __name__ == "__main__":
    asyncio.run(main())
