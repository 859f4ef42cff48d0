"""Runs batches of one model on one backend: passes over prompts, and decode loops.

It knows neither which sequences run together nor when one ends; that is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from ..models.config import ModelConfig
from ..models.fusion import EIGHT_BIT_RULES, PREFILL_RULES, fuse
from ..models.graph import LOGITS, decoder
from ..models.rope import RopeTables
from ..ops.node import Node
from ..ops.weights import MAX_PACKED_ROWS
from .batch import Batch
from .decode import DecodeLoop, decode_step
from .graphs import KEPT_CHUNKS, MAX_STEPS, GraphCache, padded_rows, padded_sequences
from .input_buffer import InputBuffer
from .kv_cache import PAGE, PagedCache, pages_for
from .prefill import PrefillPass
from .sampler import Sampler
from .sequence import SequenceState, idle_sequence

__all__ = ["Runner"]


class Runner:
    """One model on one backend, with its cache. context: tokens a sequence may have.

    graph: the model's node list, before any fusion; values: weights, cache and rotation tables by name, whose addresses
    never change; steps, passes: the captured graphs of decode steps and of prompts.
    """

    def __init__(
        self, backend: Backend, config: ModelConfig, weights: Mapping[str, Array], cache: PagedCache, context: int
    ) -> None:
        self.backend, self.config, self.cache = backend, config, cache
        parts = {name: backend.upload(part) for name, part in config.lora_parts().items()}
        self.values: dict[str, Array] = {**weights, **parts, **cache.arrays}
        rope = config.ropes.get("rope")
        self.rope = RopeTables(rope, context) if rope else None
        if self.rope is not None:
            self.values["rope.cos"], self.values["rope.sin"] = map(backend.upload, (self.rope.cos, self.rope.sin))
        self._pages = pages_for(context)  # of a sequence at most
        self.graph = decoder(config)
        self._body = self._large_body = fuse(self.graph.body, PREFILL_RULES)
        if backend.activations == "fp8":
            self._large_body = fuse(self.graph.body, EIGHT_BIT_RULES)
        self._head = fuse(self.graph.selected_rows(), PREFILL_RULES)
        self._step_nodes: dict[Any, list[Node]] = {}
        self.steps = GraphCache[DecodeLoop](MAX_STEPS)
        self.passes = GraphCache[PrefillPass](KEPT_CHUNKS * padded_rows(min(backend.prefill_chunk, cache.pages * PAGE)))

    # -- prompts

    def batch(self, parts: Sequence[tuple[SequenceState, int]], all_logits: bool = False) -> Batch:
        """The next ``count`` tokens of each sequence; see ``Batch.build``."""
        return Batch.build(parts, self.rope, self.cache.padding_page, all_logits)

    def forward(self, batch: Batch) -> Array | None:
        """Run a pass. Returns the logits that it asks for, [r, vocab_size] float32, or None if it asks for none.

        The first pass of a size is run launch by launch, padded as a captured one will be: a product's sums may depend
        on its number of rows, and the same prompt must give the same logits every time.
        """
        size, hidden = self._captured_size(batch), None
        if size is None:
            inputs = InputBuffer(self.backend, {**batch.arrays, **batch.tables}).device
        elif self.passes.first_time(size):
            inputs = self._new_pass(size).send(batch)
        else:
            inputs, hidden = self._replay(size, batch)
        if hidden is None:
            hidden = self.backend.run(self._body_of(inputs), {**self.values, **inputs}, (self.graph.out,))
        if not len(batch.arrays["logit_rows"]):
            return None
        return self.backend.run(self._head, {**self.values, **inputs, **hidden}, (LOGITS,))[LOGITS]

    def _captured_size(self, batch: Batch) -> tuple[int, int] | None:
        """(rows, sequences) of the graph that serves the batch. None for a pass that is never captured: it brings
        rotation tables of its own, or has too many rows to be kept."""
        sequences = padded_sequences(batch.sequences)
        # The attention op takes as many rows as sequences for a decode step, so a prompt gets at least one row more.
        rows = padded_rows(max(batch.rows, sequences + 1))
        if not self.backend.captures or batch.tables or rows > self.passes.max_cost:
            return None
        return rows, sequences

    def _new_pass(self, size: tuple[int, int]) -> PrefillPass:
        return PrefillPass(self.backend, self._run_body, *size, self._pages)

    def _replay(self, size: tuple[int, int], batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        """Queue the body of a pass as a captured graph. Returns its inputs and its result; see ``PrefillPass``."""
        chosen = self.passes.take(size)
        if chosen is None:
            self.passes.make_room(size[0])
            chosen = self._new_pass(size)
        try:
            inputs, hidden = chosen.send(batch), chosen.replay()
        except BaseException:
            chosen.close()
            raise
        # A pass is queued as a whole, on one CUDA stream, before another can begin: so runs may share its graph.
        self.passes.keep(size, chosen, size[0])
        return inputs, hidden

    def _run_body(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.backend.run(self._body_of(inputs), {**self.values, **inputs}, (self.graph.out,))

    def _body_of(self, inputs: Mapping[str, Array]) -> list[Node]:
        """The nodes of a pass over these rows: one of two lists, since backends keep what they plan for a list."""
        return self._large_body if len(inputs["input_ids"]) > MAX_PACKED_ROWS else self._body

    # -- decoding

    def draw(self, active: Sequence[SequenceState], logits: Array) -> list[np.ndarray[Any, Any]]:
        """Draw a token for each sequence from its row of the logits: ``Sampler.outs``, in its order, on the host."""
        # The device is busy with the prompt now, so the host has time to make the sampler's inputs.
        sampler = Sampler(self.config.vocab_size, active)
        seq_lens = np.array([len(s.tokens) for s in active], np.int32)
        inputs = InputBuffer(self.backend, {**sampler.inputs, "seq_lens": seq_lens}).device
        outs = self.backend.run(sampler.nodes, {**inputs, LOGITS: logits}, sampler.outs)
        return [self.backend.download(outs[name]) for name in sampler.outs]

    def begin_decode(self, active: Sequence[SequenceState]) -> tuple[Any, DecodeLoop]:
        """A decode loop that goes on from these sequences, whose last token has been drawn but not fed; and its key.

        It is the caller's until ``end_decode``.
        """
        sampler = Sampler(self.config.vocab_size, active)
        sequences = padded_sequences(len(active))
        key = (sequences, sampler.key)
        loop = self.steps.take(key) or DecodeLoop(
            self.backend, self._step(key, sampler), self.values, sampler, sequences, self._pages
        )
        idle = [idle_sequence(self.cache.padding_page)] * (sequences - len(active))
        try:
            loop.begin(self.batch([(s, 1) for s in [*active, *idle]]), sampler)
        except BaseException:
            loop.close()
            raise
        return key, loop

    def end_decode(self, key: Any, loop: DecodeLoop) -> None:
        """Keep the loop for later. A closed runner keeps none."""
        if self.values:
            self.steps.keep(key, loop)
        else:
            loop.close()

    def _step(self, key: Any, sampler: Sampler) -> list[Node]:
        """The nodes of a step: one list for each kind, since backends keep what they plan for a list."""
        if key not in self._step_nodes:
            self._step_nodes[key] = decode_step(self.graph, key[0], sampler.nodes, self.backend.deterministic)
        return self._step_nodes[key]

    def drop_graphs(self) -> None:
        """Give back what is only kept to be fast the next time. Graphs in use are not among it."""
        self.steps.close()
        self.passes.close()

    def close(self) -> None:
        """Drop graphs and arrays, so that their memory is free now and not when a reference cycle is collected."""
        self.drop_graphs()
        self.values.clear()
        self.cache.arrays.clear()
