"""Trials of a whole model: what is read and generated, what that costs in bytes and operations, and how long it takes.

A trial reads a prompt and draws one token, or generates tokens after a prompt, for a batch of equal sequences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.kv_cache import PAGE, pages_for
from ..engine.sequence import SequenceState
from ..errors import ParameterError
from ..model import Model
from ..models.config import ModelConfig
from ..ops.weights import stored_bytes
from ..sampling_params import SamplingParams

__all__ = ["UNTIL_REPLAYED", "Runs", "Trial", "cache_tokens", "prompt_operations", "step_bytes", "trials"]

# Runs that warm a trial up. The first prompt of a size is run launch by launch and leaves no graph, the second makes
# one that is run launch by launch again, the third captures it, and all after it replay it. A decode step needs fewer.
UNTIL_REPLAYED = 3


@dataclass(frozen=True)
class Trial:
    """One row to measure.

    prompt, generated: tokens of each sequence that are read or drawn; one of them is 0. depth: tokens of each in the
    cache before; batch: sequences.
    """

    prompt: int
    generated: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """ "pp512 @ d4096 b8", in the manner of llama-bench."""
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return what + (f" @ d{self.depth}" if self.depth else "") + (f" b{self.batch}" if self.batch > 1 else "")

    @property
    def start(self) -> int:
        """Tokens of the prompt before generating: there must be one."""
        return max(1, self.depth)

    @property
    def tokens(self) -> int:
        """Tokens of each sequence at the end: the one that is drawn last is never fed, but has its place."""
        return self.depth + self.prompt + 1 if self.prompt else self.start + self.generated + 1


def trials(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Trial]:
    """Every combination; 0 tokens to read or to generate is no trial. Raises ParameterError if nothing is left."""
    found = [Trial(p, 0, d, b) for d in depths for b in batches for p in prompts if p]
    found += [Trial(0, n, d, b) for d in depths for b in batches for n in generated if n]
    if not found:
        raise ParameterError("nothing to measure: give tokens to read (-p) or to generate (-n)")
    return found


def cache_tokens(batch: int, tokens: int) -> int:
    """What the cache must hold for that many sequences of that length, in whole pages."""
    return batch * pages_for(tokens) * PAGE


def step_bytes(model: Model, length: float, batch: int) -> float:
    """Bytes that a decode step must read: every weight once, and the keys and values of ``length`` tokens a sequence.

    A table from which only rows are taken (embedding, learned positions) counts only if it is the head as well.
    """
    values, config = model.engine.runner.values, model.config
    used = {id(values[n]): values[n] for n in config.weight_shapes() if n not in ("embed_tokens", "position_table")}
    weights = sum(stored_bytes(a) for a in used.values())
    seen = sum(min(length, w) if w else length for w in config.windows)
    return weights + 2 * batch * seen * config.num_kv_heads * config.head_dim * model.engine.cache.dtype.itemsize


def prompt_operations(config: ModelConfig, trial: Trial) -> float:
    """Floating-point operations of reading a prompt: two per multiply-add, causal attention by the pairs it sees."""
    rows = trial.batch * trial.prompt
    shapes = config.weight_shapes()
    matrices = sum(
        s[0] * s[1] for n, s in shapes.items() if len(s) == 2 and n not in ("embed_tokens", "position_table", "lm_head")
    )
    head = trial.batch * shapes["lm_head"][0] * shapes["lm_head"][1]  # of the last token alone
    at = np.arange(trial.depth, trial.depth + trial.prompt, dtype=np.float64) + 1
    pairs = sum(float((np.minimum(at, w) if w else at).sum()) for w in config.windows)
    return 2 * (rows * matrices + head) + 4 * config.num_heads * config.head_dim * trial.batch * pairs


class Runs:
    """Runs trials on one model. Prompts are random tokens, others at every repeat."""

    def __init__(self, model: Model) -> None:
        self._model, self._engine = model, model.engine
        self._rng = np.random.default_rng(0)

    def _sequences(self, batch: int, tokens: int, generated: int) -> list[SequenceState]:
        params = SamplingParams(temperature=0.0, max_tokens=generated, ignore_eos=True, seed=0)
        return [SequenceState(self._tokens(tokens), params, frozenset()) for _ in range(batch)]

    def _tokens(self, count: int) -> list[int]:
        found: list[int] = self._rng.integers(0, self._model.config.vocab_size, count).tolist()
        return found

    def prompt(self, trial: Trial) -> float:
        """Seconds from the call to the first token, on the host, when the prompt is fed on top of ``depth`` tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
        prompts = [self._tokens(trial.depth) for _ in range(trial.batch)]
        if trial.depth:  # the prefix cache keeps what is read here: a whole number of pages
            self._run([SequenceState(p, params, frozenset()) for p in prompts])
        sequences = [SequenceState(p + self._tokens(trial.prompt), params, frozenset()) for p in prompts]
        began = time.perf_counter()
        self._run(sequences)
        return time.perf_counter() - began

    def _run(self, sequences: Sequence[SequenceState]) -> None:
        for _ in self._engine.generate(sequences):
            pass

    def generation(self, trial: Trial) -> tuple[float, float]:
        """(seconds to the first token, seconds for the ``generated`` tokens of each sequence after it)."""
        sequences = self._sequences(trial.batch, trial.start, trial.generated + 1)
        began = time.perf_counter()
        stamps = []
        for _ in self._engine.generate(sequences):
            stamps.append(time.perf_counter())
        if len(stamps) != trial.generated + 1:  # the cache was made for all sequences together
            raise AssertionError(f"{trial.name} took {len(stamps)} steps")
        return stamps[0] - began, stamps[-1] - stamps[0]
