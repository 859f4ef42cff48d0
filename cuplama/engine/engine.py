"""The engine: sequences of token ids in, one token of each per step out, for callers from any thread.

It knows neither text nor files. One sequence is a batch of one; every pass is ragged.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from ..errors import DeviceError
from ..models.config import ModelConfig
from ..sampling_params import SamplingParams
from .kv_cache import PagedCache, pages_for
from .runner import Runner
from .scheduler import Drawn, Progress, Scheduler
from .sequence import SequenceState
from .sharing import Run
from .stats import EngineStats

__all__ = ["Engine"]

_Step = TypeVar("_Step")
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _start_again() -> None:
    for engine in list(_engines):
        engine.start_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again)


class Engine:
    """Runs one model on one backend.

    weights: canonical name -> device array; context: tokens a sequence may have; cache_tokens: tokens that all
    sequences together may have in the cache; kv_cache_dtype: what that holds, one of ``KV_CACHE_DTYPES``.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        weights: Mapping[str, Array],
        context: int,
        cache_tokens: int,
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.backend, self.config, self.context = backend, config, context
        self.cache = PagedCache(backend, config, pages_for(max(cache_tokens, context)), kv_cache_dtype)
        self.runner = Runner(backend, config, weights, self.cache, context)
        self.scheduler = Scheduler(self.runner, context)
        self.sharing = self.scheduler.sharing
        backend.when_short_of_memory(self.runner.drop_graphs)
        _engines.add(self)

    def __repr__(self) -> str:
        return f"<Engine {self.config.architecture} on {self.backend.name}, cache of {self.cache.pages} pages>"

    @property
    def stats(self) -> EngineStats:
        """What it has done so far, and is doing now."""
        return EngineStats(pages=self.cache.pages, pages_used=self.cache.pages - self.cache.free)

    def close(self) -> None:
        """Give back graphs, weights and cache. A run that has not ended gets ClosedError at its next step."""
        if self.sharing.closed is not None:
            return
        with self.sharing.turn:
            self.sharing.close()
            self.runner.close()
        self.sharing.free_left()

    def start_again(self) -> None:
        """In a child that was forked, where the parent's other threads and its GPU are not: see ``Sharing``."""
        self.sharing.start_again()
        if not self.backend.forks:
            self.sharing.closed = partial(
                DeviceError,
                f"a model on {self.backend.name} cannot be used in a child that was forked after it was loaded;"
                ' load it in the child, or start processes by "spawn"',
            )

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """The logits after each token, float32 [rows, vocab_size], an array for each pass, in order."""
        sequence = SequenceState(tokens, SamplingParams(), frozenset())
        run = Run([sequence], pages_for(len(tokens)))
        return self._turns(run, self._logits(sequence, run))

    def _logits(self, sequence: SequenceState, run: Run) -> Generator[np.ndarray[Any, Any]]:
        given = 0
        with self.sharing.entered(run):
            while given < len(sequence.tokens):
                for rows in self.scheduler.prefill([sequence], all_logits=True, run=run):
                    if sequence.cached > given:  # those before were given before the run was suspended
                        given = sequence.cached
                        yield self.backend.download(rows)

    def generate(self, sequences: Sequence[SequenceState], progress: Progress | None = None) -> Generator[Drawn]:
        """Draw tokens until every sequence has a finish_reason; see ``Scheduler.run``.

        Runs of several threads, and of one, take turns, step by step.
        """
        run = Run()
        return self._turns(run, self.scheduler.run(sequences, progress, run))

    def _turns(self, run: Run, steps: Generator[_Step]) -> Generator[_Step]:
        """The same steps, each in its turn: graphs and the device's memory pools serve one thread at a time."""
        sharing = self.sharing
        try:
            while True:
                run.asked, run.thread = True, threading.get_ident()
                with sharing.turn:
                    sharing.check_open()
                    step = next(steps, None)
                    run.asked, run.moved = False, time.monotonic()
                sharing.free_left()
                if step is None:
                    return
                yield step
        finally:
            steps.close()
