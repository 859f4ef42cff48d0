"""Prompts that fill their pages: the place of the first drawn token is on a page that they do not have yet."""

from __future__ import annotations

import pytest

from cuplama.engine.kv_cache import PAGE
from tests.tiny import LLAMA, load


@pytest.mark.parametrize("length", [PAGE - 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
@pytest.mark.parametrize("pages", [3, 12])
def test_a_prompt_that_fills_its_pages_goes_on_in_captured_steps(length: int, pages: int) -> None:
    """Alone and beside others; with few pages they take each other's."""
    prompts = [[(7 * i + j) % 60 for i in range(length)] for j in range(3)]
    with load(LLAMA, context=192, cache_tokens=pages * PAGE) as model:
        plain = [model.generate(p, max_tokens=6, temperature=0.0, ignore_eos=True).tokens for p in prompts]
        model.backend.captures = True
        for prompt, wanted in zip(prompts, plain, strict=True):
            assert model.generate(prompt, max_tokens=6, temperature=0.0, ignore_eos=True).tokens == wanted
        found = model.generate(prompts, max_tokens=6, temperature=0.0, ignore_eos=True)
        assert [c.tokens for c in found] == plain
        assert model.engine.cache.free == model.engine.cache.pages
