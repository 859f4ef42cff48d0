"""The server that is measured, as a process of its own: ``python -m benchmarks.serving.server``.

Its settings are a JSON object on standard input. When it is ready it prints a JSON object in one line: its address, the
name of its model, the size of its vocabulary and its context, what it runs on, and where ``library`` asks for it, the
seconds that ``Model.generate`` took for the same work, in this process and before anything was served.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.engine.kv_cache import PAGE
from cuplama.lab.dummy import Source
from cuplama.lab.environment import environment
from cuplama.model import Model
from cuplama.server import lifecycle
from cuplama.server.service import Service
from cuplama.server.warm_up import warm_up

__all__ = ["Library", "Settings", "main"]


@dataclass(frozen=True)
class Library:
    """A call of ``Model.generate``: so many prompts, tokens of each, tokens generated for each, and repeats of it."""

    sequences: int
    tokens: int
    new: int
    repeats: int


@dataclass(frozen=True)
class Settings:
    """source: the fields of a ``Source``; context, cache_tokens: as of ``load``; library: what to time before."""

    source: dict[str, Any] = field(default_factory=lambda: {"model": None})
    context: int | None = None
    cache_tokens: int | str = "auto"
    library: Library | None = None

    def to_json(self) -> str:
        """What ``read`` reads, in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Settings:
        """The settings of a JSON object."""
        fields = json.loads(text)
        library = fields.pop("library", None)
        return cls(**fields, library=None if library is None else Library(**library))


def _library(model: Model, asked: Library) -> list[float]:
    """Seconds of each repeat, after one that warms up. Prompts are others every time."""
    rng, seconds = np.random.default_rng(2), []
    for _ in range(asked.repeats + 1):
        prompts = rng.integers(0, model.config.vocab_size, (asked.sequences, asked.tokens)).tolist()
        began = time.perf_counter()
        done = model.generate(prompts, temperature=0.0, max_tokens=asked.new, ignore_eos=True)
        seconds.append(time.perf_counter() - began)
        assert all(len(c.tokens) == asked.new for c in done)
    return seconds[1:]


def main() -> int:
    settings = Settings.read(sys.stdin.readline())
    source = Source(**settings.source)
    sock = lifecycle.listen("127.0.0.1", 0)
    model = source.open(settings.context, settings.cache_tokens, spelled=True)
    name = Path(source.model).name if source.model else "bundled"
    found: dict[str, Any] = {
        "url": f"http://127.0.0.1:{sock.getsockname()[1]}",
        "name": name,
        "vocab_size": model.config.vocab_size,
        "context": model.context,
        "cache_tokens": model.engine.cache.pages * PAGE,
        "max_running": model.engine.max_running,
        "environment": environment(model.backend),
    }
    if settings.library is not None:
        found["library_seconds"] = _library(model, settings.library)
    warm_up(model)
    print(json.dumps(found), flush=True)
    lifecycle.serve(Service([name], model), lambda: model, sock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
