"""Prefill and decode: sequences of token ids in, one token of each per step out.

The engine knows neither text nor files. It drives a backend through the node list of the model, keeps the sequences'
pages, and calls the sampler's ops. One sequence is a batch of one; every pass is ragged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..backends import Backend
from ..dtypes import Array, dtype_name
from ..errors import DeviceError
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import LOGITS, decoder
from ..models.rope import RopeTables, Span
from ..ops.node import Node
from ..sampling_params import SamplingParams
from .decode import DecodeLoop, batch_size, decode_nodes
from .input_buffer import Packed
from .kv_cache import PagedCache, block_table, pages_for
from .prefill import PrefillPasses, most_logits
from .sampler import Sampler, drawn_tokens
from .sequence import SequenceState, Token

__all__ = ["Engine", "Progress", "not_finite"]

_MOST_LOOPS = 20  # recordings kept for batches to come: as a batch of 64 or so shrinks, it needs one of every size
Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
_Step = TypeVar("_Step")


def not_finite(logits: str, dtype: str) -> DeviceError:
    """The error for logits that nothing can be made of."""
    return DeviceError(f"{logits} are not finite in {dtype}; --dtype float32 may help, or a weight is damaged")


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
        self._rope = RopeTables(config.ropes.get("rope"), context) if config.ropes.get("rope") else None
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
        sequence = SequenceState(tokens, SamplingParams(), frozenset())
        with self.cache.reserve(pages_for(len(tokens))):
            try:
                for rows in self._prefill([sequence], True, None):
                    yield self.backend.download(rows)
            finally:
                self.cache.release(sequence.pages)

    def generate(
        self, sequences: Sequence[SequenceState], progress: Progress | None = None
    ) -> Generator[list[tuple[SequenceState, Token]]]:
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
        self, sequences: Sequence[SequenceState], progress: Progress | None
    ) -> Generator[list[tuple[SequenceState, Token]]]:
        waiting = list(sequences)
        while waiting:
            wave = [waiting.pop(0)]
            pages = pages_for(self._longest(wave[0]))
            while waiting and pages + (need := pages_for(self._longest(waiting[0]))) <= self.cache.unreserved:
                pages += need
                wave.append(waiting.pop(0))
            with self.cache.reserve(pages):
                try:
                    yield from self._run(wave, progress)
                finally:
                    for s in wave:
                        self.cache.release(s.pages)

    def _longest(self, s: SequenceState) -> int:
        """Tokens of this sequence at the end."""
        limit = s.params.max_tokens
        return self.context if limit is None else min(self.context, len(s.prompt) + limit)

    def _run(self, wave: list[SequenceState], progress: Progress | None) -> Iterator[list[tuple[SequenceState, Token]]]:
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

    def _draw(self, active: list[SequenceState], progress: Progress | None = None) -> list[np.ndarray[Any, Any]]:
        """Feed what is not cached yet and draw a token for each sequence: what ``Sampler.draw`` gives, on the host."""
        logits = self._last_rows(active, progress)
        # The device is busy with the prompt now, so the host has time for the sampler.
        sampler = Sampler(self.config.vocab_size, active)
        pos = np.array([len(s.tokens) for s in active], np.int32)
        inputs = Packed(self.backend, {**sampler.inputs, "positions": pos}).device
        return [self.backend.download(a) for a in sampler.draw(self.backend, inputs, logits, inputs["positions"])]

    def _accept(
        self, active: list[SequenceState], outs: list[np.ndarray[Any, Any]]
    ) -> list[tuple[SequenceState, Token]]:
        """Append the drawn tokens to the sequences that go on, and see which ones end with it."""
        drawn = [pair for pair in zip(active, drawn_tokens(active, outs), strict=True) if pair[0].finish_reason is None]
        for s, token in drawn:
            if token.id < 0:
                raise not_finite(f"the logits after {len(s.tokens)} tokens", dtype_name(self.backend.dtype))
            s.tokens.append(token.id)
            if token.id in s.stop_ids:
                s.finish_reason = "stop"
            elif len(s.tokens) >= self._longest(s):
                s.finish_reason = "length"
        return drawn

    def _still_active(self, active: list[SequenceState]) -> list[SequenceState]:
        for s in active:
            if s.finish_reason is not None:
                self.cache.release(s.pages)
        return [s for s in active if s.finish_reason is None]

    def _recordable(self, active: list[SequenceState]) -> int:
        """Steps that a recording can do from here: 0 without one, or where the rotation changes at the next token."""
        if not active or not self.backend.captures:
            return 0
        steps = [self._longest(s) - len(s.tokens) for s in active]
        if self.config.ropes.get("rope") is not None:
            steps += [self.config.ropes.get("rope").stable_steps(len(s.tokens)) for s in active]
        return min(steps)

    def _replay(self, active: list[SequenceState], steps: int) -> Iterator[list[tuple[SequenceState, Token]]]:
        """Replay up to ``steps`` decode steps, fewer if a sequence ends: what is in flight then is still read."""
        sampler = Sampler(self.config.vocab_size, active)
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

    def rope_row(self, s: SequenceState) -> int:
        """The row of the rotation tables for the last token of a sequence."""
        n = len(s.tokens)
        return int(self._rope.lookup([Span(n - 1, 1, n)])[2][0]) if self._rope is not None else 0

    def _last_rows(self, active: list[SequenceState], progress: Progress | None = None) -> Array:
        """The logits after the last token of each sequence, [len(active), vocab], in order."""
        parts = list(self._prefill(active, False, progress))
        if len(parts) == 1:
            return parts[0]
        return self.backend.upload(np.concatenate([self.backend.download(p) for p in parts]))

    def _prefill(self, active: list[SequenceState], all_rows: bool, progress: Progress | None) -> Iterator[Array]:
        """Feed every token that is not cached yet, in passes of bounded size; yields the wanted logits of each pass.

        A decode step is the case of one token per sequence.
        """
        for s in active:
            rope = self.config.ropes.get("rope")
            if rope is not None and s.cached and rope.regime(s.cached) != rope.regime(len(s.tokens)):
                s.cached = 0  # the keys were rotated with other frequencies: compute the sequence again
            self.cache.extend(s.pages, len(s.tokens))
        total = sum(len(s.tokens) - s.cached for s in active)
        done = 0
        todo = list(active)
        while todo:
            room = max(self.backend.prefill_chunk, len(todo) if total == len(todo) else 0)
            if all_rows:
                room = min(room, most_logits(self.config.vocab_size))
            batch: list[tuple[SequenceState, int]] = []
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

    def _pass(self, batch: list[tuple[SequenceState, int]], all_rows: bool) -> Array | None:
        """Run the nodes over ``count`` new tokens of each sequence. Returns the wanted logits, if any are wanted."""
        inputs = self._inputs(batch, all_rows)
        values = self._passes.run(inputs) if self.backend.captures else None
        if values is None:
            device = Packed(self.backend, inputs).device
            values = {**device, **self.run_body(device)}
        if not len(inputs["logit_rows"]):
            return None
        return self.backend.run(self._head, {**self.values, **values}, (LOGITS,))[LOGITS]

    def run_body(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the nodes of a pass up to the head; returns what the head needs of them, by name."""
        return self.backend.run(self._body, {**self.values, **inputs}, (self._head[0].ins[0],))

    def _inputs(self, batch: list[tuple[SequenceState, int]], all_rows: bool) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs of a pass over ``count`` new tokens of each sequence, int32; with tables if it needs its own."""
        counts = np.array([count for _, count in batch])
        starts = np.concatenate([[0], np.cumsum(counts)])
        pos = np.concatenate([np.arange(s.cached, s.cached + count) for s, count in batch])
        table = block_table([s.pages for s, _ in batch])
        owner = np.repeat(np.arange(len(batch)), counts)
        page = self.cache.page_size
        ends = [s.cached + count == len(s.tokens) for s, count in batch]
        inputs = {
            "input_ids": np.concatenate([s.tokens[s.cached : s.cached + count] for s, count in batch]),
            "positions": pos,
            "slot_mapping": table[owner, pos // page] * page + pos % page,
            "cu_seqlens": starts,
            "seq_lens": np.array([s.cached + count for s, count in batch]),
            "page_table": table,
            "logit_rows": np.arange(len(pos)) if all_rows else starts[1:][ends] - 1,
        }
        tables: dict[str, np.ndarray[Any, Any]] = {}
        if self._rope is not None:
            cos, sin, inputs["rope.rows"] = self._rope.lookup([Span(s.cached, n, len(s.tokens)) for s, n in batch])
            if cos is not self._rope.cos:
                tables = {"rope.cos": cos, "rope.sin": sin}
        return {**{name: array.astype(np.int32) for name, array in inputs.items()}, **tables}
