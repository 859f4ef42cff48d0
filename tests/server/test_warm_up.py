"""What a server runs before it is ready."""

from __future__ import annotations

from typing import Any

import pytest

import cuplama
from cuplama.server.warm_up import warm_up


def test_a_burst_runs_and_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with cuplama.load(device="numpy", context=40, cache_tokens=2000, max_running=8) as model:
        monkeypatch.setattr(model.backend, "captures", True)
        seen, counts, generate = list[list[int]](), list[int](), model.generate

        def counted(prompts: Any, **options: Any) -> Any:
            seen.extend(prompts)
            counts.append(len(prompts))
            return generate(prompts, **options)

        monkeypatch.setattr(model, "generate", counted)
        warm_up(model)
        assert counts == [1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8]
        assert {len(prompt) for prompt in seen} == {36}
        assert len({prompt[0] for prompt in seen}) == len(seen)
        stats = model.engine.stats
        assert (stats.steps, stats.prompt_tokens, stats.generated_tokens, stats.prefix_queries) == (0, 0, 0, 0)
        generate("Once", max_tokens=2)
        assert model.engine.stats.generated_tokens == 2


def test_nothing_runs_where_nothing_is_captured() -> None:
    with cuplama.load(device="numpy") as model:
        warm_up(model)
        assert model.engine.stats.steps == 0
