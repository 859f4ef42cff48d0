"""Passes over given tokens, without drawing any: the logits after the last token of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuplama.engine.engine import Engine
from cuplama.engine.kv_cache import PagedCache
from cuplama.engine.sequence import SequenceState

__all__ = ["last_logits", "release"]


def last_logits(engine: Engine, sequences: Sequence[SequenceState]) -> np.ndarray[Any, Any]:
    """[b, vocab_size], of sequences with tokens that are not cached yet, in the passes that the scheduler makes.

    They are the engine's only ones, and keep their pages and slots until ``release``.
    """
    scheduler, runner, rows = engine.scheduler, engine.runner, dict[int, np.ndarray[Any, Any]]()
    for i, s in enumerate(sequences):
        s.order, s.limit = (0, i), engine.context
        s.slot = s.slot or engine.cache.states.begin()
    scheduler.running = list(sequences)
    try:
        while parts := scheduler.next_parts(engine.backend.prefill_chunk, 1 << 20, decodes=False):
            logits = runner.forward(runner.batch(parts))
            whole = list(scheduler.queued(parts))
            if logits is not None:
                rows |= zip(map(id, whole), engine.backend.download(logits).copy(), strict=True)
    finally:
        scheduler.running = []
    return np.stack([rows[id(s)] for s in sequences])


def release(cache: PagedCache, sequences: Sequence[SequenceState]) -> None:
    """Take back the pages and the slots of sequences."""
    for s in sequences:
        cache.release(s.pages)
        s.slot = cache.states.release(s.slot)
