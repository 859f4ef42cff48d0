"""Trials of a whole model: what is read and generated, what that costs in bytes and operations, and how long it takes.

A trial reads a prompt and draws one token, or generates tokens after a prompt, for a batch of equal sequences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..completion import Timings
from ..engine.kv_cache import PAGE, pages_for
from ..errors import ParameterError
from ..model import Model
from ..models.config import ModelConfig
from ..models.family import TABLES
from ..ops.experts import chosen_experts
from ..ops.weights import stored_bytes

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

    Of experts as many count as an even choice takes. A table from which only rows are taken (embedding, learned
    positions) counts only if it is the head as well.
    """
    values, config = model.engine.runner.values, model.config
    recipes = config.recipes()
    used = {id(values[n]): (values[n], recipe.experts) for n, recipe in recipes.items() if n not in TABLES}
    read = chosen_experts(config.experts, config.experts_per_token, batch) / config.experts if config.experts else 1.0
    weights = sum(stored_bytes(array) * (read if experts else 1) for array, experts in used.values())
    seen = 0.0  # numbers of the cache, of one sequence
    for i, layer in enumerate(config.layers):
        heads, size = config.caches[i if layer.kv_layer is None else layer.kv_layer]
        seen += 2 * heads * size * (min(length, layer.window) if layer.window else length)
    return weights + batch * seen * model.engine.cache.dtype.itemsize


def prompt_operations(config: ModelConfig, trial: Trial) -> float:
    """Floating-point operations of reading a prompt: two per multiply-add, causal attention by the pairs it sees.

    Layers behind the last keys and values that are cached read the last token alone, and so does the head.
    """
    last = max(config.caches)
    matrices = {True: 0, False: 0}  # whether they read every token -> numbers that they have
    for name, shape in config.weight_shapes().items():
        if len(shape) >= 2 and name not in TABLES:
            number, numbers = name.partition(".")[0], shape[-2] * shape[-1]
            each = config.experts_per_token if len(shape) == 3 else 1  # of the experts those that compute a token
            matrices[name != "lm_head" and not (number.isdigit() and int(number) > last)] += each * numbers
    at = np.arange(trial.depth, trial.depth + trial.prompt, dtype=np.float64) + 1
    pairs = sum(
        float((np.minimum(at, layer.window) if layer.window else at).sum()) * (layer.head_dim or config.head_dim)
        for layer in config.layers[: last + 1]
    )
    rows = trial.batch * trial.prompt
    return 2 * (rows * matrices[True] + trial.batch * matrices[False]) + 4 * config.num_heads * trial.batch * pairs


class Runs:
    """Runs trials on one model, by the library's own call: what is timed is what a caller of ``generate`` waits for,
    text of a model with a tokenizer included. Prompts are random tokens, others at every repeat."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rng = np.random.default_rng(0)

    def _prompts(self, batch: int, tokens: int) -> list[list[int]]:
        found: list[list[int]] = self._rng.integers(0, self._model.config.vocab_size, (batch, tokens)).tolist()
        return found

    def _generate(self, prompts: list[list[int]], new: int) -> tuple[float, Timings]:
        """Seconds from the call to its return, and what it says of them."""
        began = time.perf_counter()
        done = self._model.generate(prompts, temperature=0.0, max_tokens=new, ignore_eos=True, seed=0)
        seconds = time.perf_counter() - began
        if any(len(c.tokens) != new for c in done):
            raise AssertionError(f"not every sequence has its {new} tokens")
        return seconds, done[0].timings

    def prompt(self, trial: Trial) -> float:
        """Seconds from the call to the first token, on the host, when the prompt is fed on top of ``depth`` tokens.

        Those are in the prefix cache, as far as they fill pages.
        """
        prompts = self._prompts(trial.batch, trial.depth)
        if trial.depth:
            self._generate(prompts, 1)
        more = self._prompts(trial.batch, trial.prompt)
        return self._generate([a + b for a, b in zip(prompts, more, strict=True)], 1)[0]

    def generation(self, trial: Trial) -> tuple[float, float]:
        """(seconds to the first token, seconds for the ``generated`` tokens of each sequence after it).

        All that follows the first token until the call returns counts. Where prompts were read in several passes, some
        sequences have more tokens by the time when the last has its first; the rate is that of the tokens after it.
        """
        seconds, timings = self._generate(self._prompts(trial.batch, trial.start), trial.generated + 1)
        rest = seconds - timings.prompt_seconds
        return timings.prompt_seconds, rest * trial.generated * trial.batch / timings.decode_tokens
