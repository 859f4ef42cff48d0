"""Prefill and decode: sequences of token ids in, one token of each per step out.

The engine knows neither text nor files. It drives a backend through the node list of the model, keeps the sequences'
pages, and calls the sampler's ops. One sequence is a batch of one; every pass is ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backends import Backend
from .cache import PagedCache, block_table, pages_for
from .config import ModelConfig
from .graph import LOGITS, decoder
from .op import Array
from .rope import RopeTables, Span
from .sampling import SamplingParams

__all__ = ["Engine", "Generation", "Token"]

Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)


@dataclass(frozen=True)
class Token:
    """A drawn token. logprob and top, [(id, logprob), ...], are of the raw logits; None and () unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """One sequence on its way. The consumer sets ``finish_reason`` to end it; the engine sets "stop" or "length"."""

    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    seed: int = 0
    tokens: list[int] = field(default_factory=list)  # prompt and generated
    cached: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.seed = self.params.with_seed()

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)


class Engine:
    """Runs one model on one backend.

    weights: canonical name -> device array; context: tokens a sequence may have; cache_tokens: tokens that all
    sequences together may have in the cache.
    """

    def __init__(
        self, backend: Backend, config: ModelConfig, weights: Mapping[str, Array], context: int, cache_tokens: int
    ) -> None:
        self.backend, self.config, self.context = backend, config, context
        self.nodes = decoder(config)
        # What a chunk in the middle of a prompt needs: everything that feeds the cache, but not the head.
        self._body = self.nodes[: [node.op for node in self.nodes].index("select_rows")]
        self.cache = PagedCache(backend, config, pages_for(max(cache_tokens, context)))
        self._values: dict[str, Array] = {**weights, **self.cache.arrays}
        self._rope = RopeTables(config.rope, context) if config.rope else None
        if self._rope is not None:
            self._tables = backend.upload(self._rope.cos), backend.upload(self._rope.sin)

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """The logits after each token, float32 [rows, vocab], in pieces as the passes yield them."""
        sequence = Generation(tokens, SamplingParams(), frozenset())
        try:
            for rows in self._prefill([sequence], True, None):
                yield self.backend.download(rows)
        finally:
            self.cache.release(sequence.pages)

    def generate(
        self, sequences: Sequence[Generation], progress: Progress | None = None
    ) -> Iterator[list[tuple[Generation, Token]]]:
        """Draw tokens until every sequence has a finish_reason; yields the tokens of each step.

        Sequences run together as long as the cache holds them all at full length; what does not fit waits its turn.
        """
        waiting = list(sequences)
        while waiting:
            wave: list[Generation] = []
            free = self.cache.free
            while waiting and (need := pages_for(self._longest(waiting[0]))) <= free:
                free -= need
                wave.append(waiting.pop(0))
            try:
                yield from self._run(wave, progress)
            finally:
                for s in wave:
                    self.cache.release(s.pages)

    def _longest(self, s: Generation) -> int:
        """Tokens of this sequence at the end."""
        limit = s.params.max_tokens
        return self.context if limit is None else min(self.context, len(s.prompt) + limit)

    def _run(self, wave: list[Generation], progress: Progress | None) -> Iterator[list[tuple[Generation, Token]]]:
        for s in wave:
            if len(s.prompt) >= self._longest(s):
                s.finish_reason = "length"
        active = [s for s in wave if s.finish_reason is None]
        if not active:
            return
        logits = self._last_rows(active, progress)
        sampler = Sampler(self.backend, self.config.vocab, active)
        while active:
            drawn = list(zip(active, sampler.draw(logits), strict=True))
            for s, token in drawn:
                s.tokens.append(token.id)
                if token.id in s.stop_ids:
                    s.finish_reason = "stop"
                elif len(s.tokens) >= self._longest(s):
                    s.finish_reason = "length"
            yield drawn
            if any(s.finish_reason for s in active):
                for s in active:
                    if s.finish_reason:
                        self.cache.release(s.pages)
                active = [s for s in active if s.finish_reason is None]
                if not active:
                    return
                sampler = Sampler(self.backend, self.config.vocab, active)
            logits = self._last_rows(active)

    def _last_rows(self, active: list[Generation], progress: Progress | None = None) -> Array:
        """The logits after the last token of each sequence, [len(active), vocab], in order."""
        parts = list(self._prefill(active, False, progress))
        if len(parts) == 1:
            return parts[0]
        return self.backend.upload(np.concatenate([self.backend.download(p) for p in parts]))

    def _prefill(self, active: list[Generation], all_rows: bool, progress: Progress | None) -> Iterator[Array]:
        """Feed every token that is not cached yet, in passes of bounded size; yields the wanted logits of each pass.

        A decode step is the case of one token per sequence.
        """
        for s in active:
            rope = self.config.rope
            if rope is not None and s.cached and rope.regime(s.cached) != rope.regime(len(s.tokens)):
                s.cached = 0  # the keys were rotated with other frequencies: compute the sequence again
            self.cache.extend(s.pages, len(s.tokens))
        total = sum(len(s.tokens) - s.cached for s in active)
        done = 0
        todo = list(active)
        while todo:
            room = max(self.backend.prefill_chunk, len(todo) if total == len(todo) else 0)
            batch: list[tuple[Generation, int]] = []
            for s in todo:
                count = min(room, len(s.tokens) - s.cached)
                if count:
                    batch.append((s, count))
                    room -= count
            logits = self._pass(batch, all_rows)
            for s, count in batch:
                s.cached += count
                done += count
            todo = [s for s in todo if s.cached < len(s.tokens)]
            if progress is not None:
                progress(done, total)
            if logits is not None:
                yield logits

    def _pass(self, batch: list[tuple[Generation, int]], all_rows: bool) -> Array | None:
        """Run the nodes over ``count`` new tokens of each sequence. Returns the wanted logits, if any are wanted."""
        backend = self.backend
        counts = np.array([count for _, count in batch])
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        pos = np.concatenate([np.arange(s.cached, s.cached + count) for s, count in batch])
        table = block_table([s.pages for s, _ in batch])
        owner = np.repeat(np.arange(len(batch)), counts)
        page = self.cache.page_size
        ends = [s.cached + count == len(s.tokens) for s, count in batch]
        wanted = np.arange(len(pos)) if all_rows else (starts[1:][ends] - 1).astype(np.int64)
        inputs = {
            "ids": np.concatenate([s.tokens[s.cached : s.cached + count] for s, count in batch]),
            "pos": pos,
            "slots": table[owner, pos // page] * page + pos % page,
            "starts": starts,
            "lengths": np.array([s.cached + count for s, count in batch]),
            "blocks": table,
            "wanted": wanted,
        }
        values = {**self._values, **{k: backend.upload(v.astype(np.int32)) for k, v in inputs.items()}}
        if self._rope is not None:
            cos, sin, rows = self._rope.lookup([Span(s.cached, count, len(s.tokens)) for s, count in batch])
            static = cos is self._rope.cos
            values["rope.cos"], values["rope.sin"] = (
                self._tables if static else (backend.upload(cos), backend.upload(sin))
            )
            values["rope.rows"] = backend.upload(rows)
        if not len(wanted):
            backend.run(self._body, values, ())
            return None
        return backend.run(self.nodes, values, (LOGITS,))[LOGITS]


class Sampler:
    """The sampler's inputs for one set of active sequences, and the ops that draw with them."""

    def __init__(self, backend: Backend, vocab: int, active: list[Generation]) -> None:
        self.backend, self.active = backend, active
        p = [s.params for s in active]

        def column(name: str, dtype: Any) -> Array:
            return backend.upload(np.array([getattr(x, name) for x in p], dtype))

        self.temperature = column("temperature", np.float32)
        self.top_k = backend.upload(np.array([min(x.top_k, 2**31 - 1) for x in p], np.int32))
        self.top_p, self.min_p = column("top_p", np.float32), column("min_p", np.float32)
        self.seed = backend.upload(np.array([s.seed for s in active], np.uint64))
        asked = [x.logprobs for x in p if x.logprobs is not None]
        self.top_n = min(max(asked), vocab) if asked else None
        self.penalties: list[Array] | None = None
        if any(_penalised(x) for x in p):
            seen = np.zeros((len(active), vocab), np.int32)
            for row, s in zip(seen, active, strict=True):
                row += 2 * np.bincount(np.array(s.tokens[len(s.prompt) :], np.int64), minlength=vocab).astype(np.int32)
                row[np.array(s.prompt, np.int64)] |= 1
            bias = None
            if any(x.logit_bias for x in p):
                bias = np.zeros((len(active), vocab), np.float32)
                for i, x in enumerate(p):
                    for token, value in x.logit_bias.items():
                        bias[i, token] = value
            width = max([1, *(len(s.stop_ids) for s in active)])
            stops = np.full((len(active), width), -1, np.int32)
            for row, s in zip(stops, active, strict=True):
                row[: len(s.stop_ids)] = sorted(s.stop_ids)
            min_pos = np.array([len(s.prompt) + s.params.min_tokens for s in active], np.int32)
            self.seen = backend.upload(seen)
            self.bias = None if bias is None else backend.upload(bias)
            self.stops, self.min_pos = backend.upload(stops), backend.upload(min_pos)
            self.penalties = [column(f"{n}_penalty", np.float32) for n in ("repetition", "presence", "frequency")]

    def draw(self, logits: Array) -> list[Token]:
        """One token per sequence from logits [b, vocab]."""
        call = self.backend.call
        pos = self.backend.upload(np.array([len(s.tokens) for s in self.active], np.int32))
        adjusted = logits
        if self.penalties is not None:
            ins = [logits, self.seen, self.bias, self.stops, pos, self.min_pos, *self.penalties]
            (adjusted,) = call("penalize", ins, {})
        settings = [self.temperature, self.top_k, self.top_p, self.min_p, self.seed, pos]
        (tokens,) = call("sample", [adjusted, *settings], {})
        if self.penalties is not None:
            call("count_token", [self.seen, tokens], {})
        if self.top_n is None:
            return [Token(int(t)) for t in self.backend.download(tokens)]
        scores = [self.backend.download(a) for a in call("logprobs", [logits, tokens], {"N": self.top_n})]
        found = []
        for s, t, logp, ids, top in zip(self.active, self.backend.download(tokens), *scores, strict=True):
            n = s.params.logprobs
            pairs = tuple((int(i), float(v)) for i, v in zip(ids[:n], top[:n], strict=True))
            found.append(Token(int(t)) if n is None else Token(int(t), float(logp), pairs))
        return found


def _penalised(p: SamplingParams) -> bool:
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or p.min_tokens > 0
    )
