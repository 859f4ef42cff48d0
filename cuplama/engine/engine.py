"""The engine: sequences of token ids in, one token of each per step out, for callers from any thread.

It knows neither text nor files. One sequence is a batch of one; every pass is ragged.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from ..models.config import ModelConfig
from ..sampling_params import SamplingParams
from .kv_cache import PagedCache, pages_for
from .runner import Runner
from .scheduler import Drawn, Progress, Scheduler
from .sequence import SequenceState

__all__ = ["Engine"]

_Step = TypeVar("_Step")


class Engine:
    """Runs one model on one backend.

    weights: canonical name -> device array; context: tokens a sequence may have; cache_tokens: tokens that all
    sequences together may have in the cache.
    """

    def __init__(
        self, backend: Backend, config: ModelConfig, weights: Mapping[str, Array], context: int, cache_tokens: int
    ) -> None:
        self.backend, self.config, self.context = backend, config, context
        self.cache = PagedCache(backend, config, pages_for(max(cache_tokens, context)))
        self.runner = Runner(backend, config, weights, self.cache, context)
        self.scheduler = Scheduler(self.runner, context)
        self._lock = threading.RLock()
        backend.when_short_of_memory(self.runner.drop_graphs)

    def __repr__(self) -> str:
        return f"<Engine {self.config.architecture} on {self.backend.name}, cache of {self.cache.pages} pages>"

    def close(self) -> None:
        """Give back graphs, weights and cache."""
        with self._lock:
            self.runner.close()

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """The logits after each token, float32 [rows, vocab_size], an array for each pass, in order."""
        return self._one_at_a_time(self._logits(tokens))

    def _logits(self, tokens: Sequence[int]) -> Generator[np.ndarray[Any, Any]]:
        sequence = SequenceState(tokens, SamplingParams(), frozenset())
        with self.cache.reserve(pages_for(len(tokens))):
            try:
                for rows in self.scheduler.prefill([sequence], all_logits=True):
                    yield self.backend.download(rows)
            finally:
                self.cache.release(sequence.pages)

    def generate(self, sequences: Sequence[SequenceState], progress: Progress | None = None) -> Generator[Drawn]:
        """Draw tokens until every sequence has a finish_reason; see ``Scheduler.run``.

        Runs of several threads take turns, step by step.
        """
        return self._one_at_a_time(self.scheduler.run(sequences, progress))

    def _one_at_a_time(self, steps: Generator[_Step]) -> Generator[_Step]:
        """The same steps, each under the lock: graphs and the device's memory pools serve one thread at a time."""
        try:
            while True:
                with self._lock:
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        finally:
            with self._lock:
                steps.close()
