"""Three tiny models of the golden cases that many tests run on NumPy, and how they are loaded, copied and checked."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuplama
from cuplama import Model
from tests.paths import GOLDEN

CHARS = GOLDEN / "gpt2-char"  # a tokenizer of 65 characters; no BOS, no stop token; context 80
LLAMA = GOLDEN / "llama3-gqa"  # no tokenizer
DELTA = GOLDEN / "qwen35"  # no tokenizer; layers with states


def load(folder: Path, **options: Any) -> Model:
    return cuplama.load(folder, device="numpy", **options)


def copy(folder: Path, to: Path, **files: Any) -> Path:
    """A copy of a model folder with some JSON files replaced: name without .json -> content, or None to remove it."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    for name, content in files.items():
        path = to / f"{name}.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return to


def in_threads(*calls: Callable[[], Any], seconds: float = 60.0) -> list[Any]:
    """The results of calls that run at once; an error is one of them. A call that takes longer fails the test."""
    results: list[Any] = [TimeoutError("a thread did not come back")] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return results


def assert_all_pages_free(*models: Model) -> None:
    """After a test no sequence holds a page of the cache, or a slot."""
    for model in models:
        cache = model.engine.cache
        assert cache.free == cache.pages
        assert sorted([*cache._empty, *cache._left]) == list(range(cache.pages))
        assert not any(cache._owners)
        if cache.states.arrays:
            assert sorted([*cache.states._empty, *cache.states._kept.values()]) == list(
                range(1, cache.states.slots + 1)
            )
