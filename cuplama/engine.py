"""Prefill and decode: sequences of token ids in, one token of each per step out.

The engine knows neither text nor files. It drives a backend through the node list of the model, keeps the sequences'
pages, and calls the sampler's ops. One sequence is a batch of one; every pass is ragged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .backends import Backend
from .cache import PagedCache, block_table, pages_for
from .config import ModelConfig
from .decode import DecodeLoop, batch_size, decode_nodes
from .errors import DeviceError
from .fuse import PREFILL_RULES, fuse
from .graph import LOGITS, Node, decoder
from .op import Array, dtype_name
from .packed import Packed
from .prefill import PrefillPasses, most_logits
from .rope import RopeTables, Span
from .sampling import SamplingParams

__all__ = ["Engine", "Generation", "Token", "not_finite"]

_MOST_LOOPS = 20  # recordings kept for batches to come: as a batch of 64 or so shrinks, it needs one of every size

Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
_Step = TypeVar("_Step")


def not_finite(logits: str, dtype: str) -> DeviceError:
    """The error for logits that nothing can be made of."""
    return DeviceError(f"{logits} are not finite in {dtype}; --dtype float32 may help, or a weight is damaged")


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
        self.nodes = fuse(decoder(config), PREFILL_RULES)
        # What a chunk in the middle of a prompt needs: everything that feeds the cache, but not the head.
        head = [node.op for node in self.nodes].index("select_rows")
        self._body, self._head = self.nodes[:head], self.nodes[head:]
        self.cache = PagedCache(backend, config, pages_for(max(cache_tokens, context)))
        # Everything that stays where it is: weights, cache, rotation tables.
        self.values: dict[str, Array] = {**weights, **self.cache.arrays}
        self._rope = RopeTables(config.rope, context) if config.rope else None
        if self._rope is not None:
            self.values["rope.cos"], self.values["rope.sin"] = map(backend.upload, (self._rope.cos, self._rope.sin))
        self._decode_nodes: dict[int, list[Node]] = {}
        self._loops: dict[Any, DecodeLoop] = {}
        self._passes = PrefillPasses(self)
        self._lock = threading.RLock()
        backend.when_short_of_memory(self._drop_recordings)

    def close(self) -> None:
        """Drop recordings and arrays, so that their memory is free now and not when a reference cycle is collected."""
        with self._lock:
            self._drop_recordings()
            self.values.clear()
            self.cache.arrays.clear()

    def _drop_recordings(self) -> None:
        """Give back what was only kept to be fast the next time. Recordings in use are not among it."""
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()
        self._passes.close()

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """The logits after each token, float32 [rows, vocab], in pieces as the passes yield them."""
        return self._one_at_a_time(self._logits(tokens))

    def _logits(self, tokens: Sequence[int]) -> Generator[np.ndarray[Any, Any]]:
        sequence = Generation(tokens, SamplingParams(), frozenset())
        with self.cache.promise(pages_for(len(tokens))):
            try:
                for rows in self._prefill([sequence], True, None):
                    yield self.backend.download(rows)
            finally:
                self.cache.release(sequence.pages)

    def generate(
        self, sequences: Sequence[Generation], progress: Progress | None = None
    ) -> Generator[list[tuple[Generation, Token]]]:
        """Draw tokens until every sequence has a finish_reason; yields the tokens of each step.

        Sequences run together as long as the cache holds them all at full length; what does not fit waits its turn.
        Runs of several threads take turns, step by step. Raises ContextError if other runs that have not ended leave no
        room even for one, and DeviceError if the model computes no logits to draw from.
        """
        return self._one_at_a_time(self._generate(sequences, progress))

    def _one_at_a_time(self, steps: Generator[_Step]) -> Generator[_Step]:
        """The same steps, each under the lock: recordings and the device's memory pools serve one thread at a time."""
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

    def _generate(
        self, sequences: Sequence[Generation], progress: Progress | None
    ) -> Generator[list[tuple[Generation, Token]]]:
        waiting = list(sequences)
        while waiting:
            wave = [waiting.pop(0)]
            pages = pages_for(self._longest(wave[0]))
            while waiting and pages + (need := pages_for(self._longest(waiting[0]))) <= self.cache.unpromised:
                pages += need
                wave.append(waiting.pop(0))
            with self.cache.promise(pages):
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
        while active:
            yield self._accept(active, self._draw(active, progress))
            active = self._still_active(active)
            while steps := self._recordable(active):
                yield from self._replay(active, steps)
                active = self._still_active(active)
            progress = None

    def _draw(self, active: list[Generation], progress: Progress | None = None) -> list[np.ndarray[Any, Any]]:
        """Feed what is not cached yet and draw a token for each sequence: what ``Sampler.draw`` gives, on the host."""
        logits = self._last_rows(active, progress)
        # The device is busy with the prompt now, so the host has time for the sampler.
        sampler = Sampler(self.config.vocab, active)
        pos = np.array([len(s.tokens) for s in active], np.int32)
        inputs = Packed(self.backend, {**sampler.inputs, "pos": pos}).device
        return [self.backend.download(a) for a in sampler.draw(self.backend, inputs, logits, inputs["pos"])]

    def _accept(self, active: list[Generation], outs: list[np.ndarray[Any, Any]]) -> list[tuple[Generation, Token]]:
        """Append the drawn tokens to the sequences that go on, and see which ones end with it."""
        drawn = [pair for pair in zip(active, _tokens(active, outs), strict=True) if pair[0].finish_reason is None]
        for s, token in drawn:
            if token.id < 0:
                raise not_finite(f"the logits after {len(s.tokens)} tokens", dtype_name(self.backend.dtype))
            s.tokens.append(token.id)
            if token.id in s.stop_ids:
                s.finish_reason = "stop"
            elif len(s.tokens) >= self._longest(s):
                s.finish_reason = "length"
        return drawn

    def _still_active(self, active: list[Generation]) -> list[Generation]:
        for s in active:
            if s.finish_reason is not None:
                self.cache.release(s.pages)
        return [s for s in active if s.finish_reason is None]

    def _recordable(self, active: list[Generation]) -> int:
        """Steps that a recording can do from here: 0 without one, or where the rotation changes at the next token."""
        if not active or not self.backend.records:
            return 0
        steps = [self._longest(s) - len(s.tokens) for s in active]
        if self.config.rope is not None:
            steps += [self.config.rope.stable_steps(len(s.tokens)) for s in active]
        return min(steps)

    def _replay(self, active: list[Generation], steps: int) -> Iterator[list[tuple[Generation, Token]]]:
        """Replay up to ``steps`` decode steps, fewer if a sequence ends: what is in flight then is still read."""
        sampler = Sampler(self.config.vocab, active)
        size = batch_size(len(active))
        key = (size, sampler.top_n, *((k, v.shape[1:]) for k, v in sampler.inputs.items()))
        # Taken out while in use: a second stream that is open at the same time gets a recording of its own.
        loop = self._loops.pop(key, None) or DecodeLoop(self, size, sampler)
        try:
            for s in active:
                self.cache.extend(s.pages, self._longest(s))
            loop.begin(active, sampler)
            launched = 0
            while True:
                going = all(s.finish_reason is None for s in active)
                while going and launched < steps and loop.in_flight < loop.ahead:
                    loop.launch()
                    launched += 1
                if not loop.in_flight:
                    return
                outs = list(loop.read())
                for s in active:
                    if s.finish_reason is None:
                        s.cached = len(s.tokens)
                if drawn := self._accept(active, outs):
                    yield drawn
        finally:
            self._keep(key, loop)

    def _keep(self, key: Any, loop: DecodeLoop) -> None:
        """Keep a recording for later; beyond a few, the oldest goes. A closed engine keeps none."""
        if key in self._loops or not self.values:
            loop.close()
            return
        self._loops[key] = loop
        if len(self._loops) > _MOST_LOOPS:
            self._loops.pop(next(iter(self._loops))).close()

    def decode_nodes(self, size: int) -> list[Node]:
        """The nodes of a decode step of that many sequences: one list per size, since backends keep what they plan."""
        if size not in self._decode_nodes:
            self._decode_nodes[size] = decode_nodes(decoder(self.config), size)
        return self._decode_nodes[size]

    def rope_row(self, s: Generation) -> int:
        """The row of the rotation tables for the last token of a sequence."""
        n = len(s.tokens)
        return int(self._rope.lookup([Span(n - 1, 1, n)])[2][0]) if self._rope is not None else 0

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
            if all_rows:
                room = min(room, most_logits(self.config.vocab))
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
        inputs = self._inputs(batch, all_rows)
        values = self._passes.run(inputs) if self.backend.records else None
        if values is None:
            device = Packed(self.backend, inputs).device
            values = {**device, **self.run_body(device)}
        if not len(inputs["wanted"]):
            return None
        return self.backend.run(self._head, {**self.values, **values}, (LOGITS,))[LOGITS]

    def run_body(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the nodes of a pass up to the head; returns what the head needs of them, by name."""
        return self.backend.run(self._body, {**self.values, **inputs}, (self._head[0].ins[0],))

    def _inputs(self, batch: list[tuple[Generation, int]], all_rows: bool) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs of a pass over ``count`` new tokens of each sequence, int32; with tables if it needs its own."""
        counts = np.array([count for _, count in batch])
        starts = np.concatenate([[0], np.cumsum(counts)])
        pos = np.concatenate([np.arange(s.cached, s.cached + count) for s, count in batch])
        table = block_table([s.pages for s, _ in batch])
        owner = np.repeat(np.arange(len(batch)), counts)
        page = self.cache.page_size
        ends = [s.cached + count == len(s.tokens) for s, count in batch]
        inputs = {
            "ids": np.concatenate([s.tokens[s.cached : s.cached + count] for s, count in batch]),
            "pos": pos,
            "slots": table[owner, pos // page] * page + pos % page,
            "starts": starts,
            "lengths": np.array([s.cached + count for s, count in batch]),
            "blocks": table,
            "wanted": np.arange(len(pos)) if all_rows else starts[1:][ends] - 1,
        }
        tables: dict[str, np.ndarray[Any, Any]] = {}
        if self._rope is not None:
            cos, sin, inputs["rope.rows"] = self._rope.lookup([Span(s.cached, n, len(s.tokens)) for s, n in batch])
            if cos is not self._rope.cos:
                tables = {"rope.cos": cos, "rope.sin": sin}
        return {**{name: array.astype(np.int32) for name, array in inputs.items()}, **tables}


class Sampler:
    """What the sampler's ops need for one set of sequences. inputs: host arrays by name; row i is sequence i.

    top_n: how many best tokens to report beside the drawn one; None: no log-probabilities.
    """

    def __init__(self, vocab: int, active: Sequence[Generation]) -> None:
        p = [s.params for s in active]

        def column(name: str, dtype: Any) -> np.ndarray[Any, Any]:
            return np.array([getattr(x, name) for x in p], dtype)

        self.inputs: dict[str, np.ndarray[Any, Any]] = {
            "temperature": column("temperature", np.float32),
            "top_k": np.array([min(x.top_k, 2**31 - 1) for x in p], np.int32),
            "top_p": column("top_p", np.float32),
            "min_p": column("min_p", np.float32),
            "seed": np.array([s.seed for s in active], np.uint64),
        }
        asked = [x.logprobs for x in p if x.logprobs is not None]
        self.top_n = min(max(asked), vocab) if asked else None
        if not any(_penalised(x) for x in p):
            return
        seen = np.zeros((len(active), vocab), np.int32)
        bias = np.zeros((len(active), vocab), np.float32)
        stop_ids = np.full((len(active), max([1, *(len(s.stop_ids) for s in active)])), -1, np.int32)
        for i, s in enumerate(active):
            np.add.at(seen[i], s.tokens[len(s.prompt) :], 2)
            seen[i, list(s.prompt)] |= 1
            bias[i, list(s.params.logit_bias)] = list(s.params.logit_bias.values())
            stop_ids[i, : len(s.stop_ids)] = sorted(s.stop_ids)
        self.inputs["seen"] = seen
        if any(x.logit_bias for x in p):
            self.inputs["bias"] = bias
        self.inputs["stop_ids"] = stop_ids
        ends = [min(len(s.prompt) + s.params.min_tokens, 2**31 - 1) for s in active]
        self.inputs["min_pos"] = np.array(ends, np.int32)
        for name in ("repetition", "presence", "frequency"):
            self.inputs[name] = column(f"{name}_penalty", np.float32)

    def draw(self, backend: Backend, inputs: Mapping[str, Array], logits: Array, pos: Array) -> tuple[Array, ...]:
        """Tokens [b] from logits [b, vocab] at positions pos [b]; then, if asked for, the outputs of ``logprobs``."""
        adjusted = logits
        if "seen" in inputs:
            before = [logits, inputs["seen"], inputs.get("bias"), inputs["stop_ids"], pos, inputs["min_pos"]]
            penalties = [inputs[name] for name in ("repetition", "presence", "frequency")]
            (adjusted,) = backend.call("penalize", [*before, *penalties], {})
        settings = [inputs[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")]
        (tokens,) = backend.call("sample", [adjusted, *settings, pos], {})
        if "seen" in inputs:
            backend.call("count_token", [inputs["seen"], tokens], {})
        if self.top_n is None:
            return (tokens,)
        return (tokens, *backend.call("logprobs", [logits, tokens], {"N": self.top_n}))


def _tokens(active: Sequence[Generation], outs: Sequence[np.ndarray[Any, Any]]) -> list[Token]:
    """The drawn tokens, from the host copies of what ``Sampler.draw`` gave."""
    ids, *scores = outs
    if not scores:
        return [Token(int(i)) for i in ids[: len(active)]]
    found = []
    for s, i, logprob, top_ids, top in zip(active, ids, *scores, strict=False):
        n = s.params.logprobs
        pairs = tuple((int(k), float(v)) for k, v in zip(top_ids[:n], top[:n], strict=True))
        found.append(Token(int(i)) if n is None else Token(int(i), float(logprob), pairs))
    return found


def _penalised(p: SamplingParams) -> bool:
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or p.min_tokens > 0
    )
