"""Runs batches of one model on one backend: passes over prompts, and decode loops.

It knows neither which sequences run together nor when one ends; that is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend, CapturedGraph, Fetch
from ..dtypes import Array
from ..models.config import ModelConfig
from ..models.fusion import EIGHT_BIT_RULES, PREFILL_RULES, fuse
from ..models.graph import LOGITS, decoder
from ..models.rope import RotationTables
from ..ops.node import Node
from ..ops.weights import MAX_PACKED_ROWS
from .batch import Batch
from .decode import DecodeLoop, decode_nodes, draw_nodes
from .graphs import MAX_PASSES, MAX_STEPS, GraphCache, padded_prompts, padded_rows
from .input_buffer import InputBuffer
from .kv_cache import PagedCache, pages_for
from .prefill import PrefillPass
from .sampler import TOKEN, Needs, Sampler, scoring_nodes
from .sequence import SequenceState

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
        self.rotations = RotationTables(config.ropes, context)
        self.values |= {name: backend.upload(table) for name, table in self.rotations.arrays.items()}
        self._pages = pages_for(context)  # of a sequence at most
        self.graph = decoder(config)
        self._cut = cut = self.graph.cut()
        head = fuse(self.graph.selected_rows(), PREFILL_RULES)
        self._body = self._large_body = fuse(cut.body, PREFILL_RULES)
        self._head = self._large_head = [*fuse(cut.rest, PREFILL_RULES), *head]
        if backend.activations == "fp8":
            self._large_body = fuse(cut.body, EIGHT_BIT_RULES)
            self._large_head = [*fuse(cut.rest, EIGHT_BIT_RULES), *head]
        self._last = fuse(cut.last, PREFILL_RULES)
        self._step_nodes: dict[Any, tuple[list[Node], list[Node]]] = {}
        self.steps = GraphCache[DecodeLoop](MAX_STEPS)
        self.passes = GraphCache[PrefillPass](MAX_PASSES)
        self._shared: CapturedGraph | None = None  # whose memory all captured graphs use: one is busy at a time

    # -- prompts

    def batch(self, parts: Sequence[tuple[SequenceState, int]], all_logits: bool = False) -> Batch:
        """The next ``count`` tokens of each sequence; see ``Batch.build``."""
        return Batch.build(parts, self.rotations, self.cache.padding_page, all_logits)

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
            hidden = self.backend.run(*self._body_call(inputs))
        if not len(batch.arrays["logit_rows"]):
            return None
        head = self._last
        if batch.all_logits:
            head = self._of_size(inputs, self._head, self._large_head)
        return self.backend.run(head, {**self.values, **inputs, **hidden}, (LOGITS,))[LOGITS]

    def _captured_size(self, batch: Batch) -> tuple[int, int] | None:
        """(rows, sequences) of the graph that serves the batch. None for a pass that is never captured: it brings
        rotation tables of its own, or has more rows than memory was reckoned for."""
        sequences = padded_prompts(batch.sequences)
        # The attention op takes as many rows as sequences for a decode step, so a prompt gets at least one row more.
        rows = padded_rows(max(batch.rows, sequences + 1))
        if not self.backend.captures or batch.tables or rows > padded_rows(self.backend.prefill_chunk):
            return None
        return rows, sequences

    def _new_pass(self, size: tuple[int, int]) -> PrefillPass:
        return PrefillPass(self.backend, self._run_body, *size, self._pages, self._shared)

    def _replay(self, size: tuple[int, int], batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        """Queue the body of a pass as a captured graph. Returns its inputs and its result; see ``PrefillPass``."""
        chosen = self.passes.take(size) or self._new_pass(size)
        try:
            inputs, hidden = chosen.send(batch), chosen.replay()
        except BaseException:
            chosen.close()
            raise
        self._shared = self._shared or chosen.graph
        # A pass is queued as a whole, on one CUDA stream, before another can begin: so the next may use its graph.
        self.passes.keep(size, chosen)
        return inputs, hidden

    def _run_body(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.backend.run(*self._body_call(inputs))

    def _body_call(self, inputs: Mapping[str, Array]) -> tuple[list[Node], dict[str, Array], Sequence[str]]:
        """What the backend is to run: nodes, values, and what to keep."""
        nodes = self._of_size(inputs, self._body, self._large_body)
        return nodes, {**self.values, **inputs}, self._cut.between

    @staticmethod
    def _of_size(inputs: Mapping[str, Array], few: list[Node], many: list[Node]) -> list[Node]:
        """The nodes of a pass over these rows: one of two lists, since backends keep what they plan for a list."""
        return many if len(inputs["input_ids"]) > MAX_PACKED_ROWS else few

    def draw(self, active: Sequence[SequenceState], logits: Array) -> Fetch:
        """Draw a token for each sequence from its row of the logits: ``Sampler.outs``, on their way to the host."""
        # The device is busy with the prompt now, so the host has time to make the sampler's inputs.
        sampler = Sampler(self.config.vocab_size, active)
        seq_lens = np.array([len(s.tokens) for s in active], np.int32)
        inputs = InputBuffer(self.backend, {**sampler.inputs, "seq_lens": seq_lens}).device
        outs = self.backend.run(sampler.nodes, {**inputs, LOGITS: logits}, sampler.outs)
        return self.backend.fetch([outs[name] for name in sampler.outs])

    def score(self, logits: Array, tokens: Sequence[int], top_n: int) -> Fetch:
        """Log-probabilities of tokens [n] under logits [n, V], on their way: tokens, logprob, top_ids, top_logprobs."""
        given = np.array(tokens, np.int32)
        nodes = scoring_nodes(min(top_n, self.config.vocab_size))
        outs = self.backend.run(nodes, {LOGITS: logits, TOKEN: self.backend.upload(given)}, nodes[0].outs)
        return self.backend.fetch([self.backend.upload(given), *(outs[name] for name in nodes[0].outs)])

    # -- decoding

    def loop(self, sequences: int, needs: Needs) -> DecodeLoop:
        """A decode loop of so many rows whose sampler can do that. It is the caller's until ``keep``."""
        key = sequences, needs
        found = self.steps.take(key)
        if found is None:
            sampler = Sampler(self.config.vocab_size, [], needs)
            nodes, values = self._step(key, sampler), self.values
            found = DecodeLoop(
                self.backend, nodes, values, sampler, sequences, self._pages, self.cache.padding_page, self._shared
            )
            self._shared = self._shared or found.graphs[0]
        return found

    def begin(self, loop: DecodeLoop, active: Sequence[SequenceState]) -> None:
        """Give the rows of a loop to these sequences, whose last token has been drawn and not fed."""
        sampler = Sampler(self.config.vocab_size, active, loop.needs)
        loop.begin(active, self.batch([(s, 1) for s in active]), sampler)

    def join(self, loop: DecodeLoop, row: int, s: SequenceState) -> None:
        """Give one row to a sequence, behind the steps that are queued."""
        loop.join(row, s, self.batch([(s, 1)]), Sampler(self.config.vocab_size, [s], loop.needs))

    def keep(self, loop: DecodeLoop) -> None:
        """Keep a loop for later. A closed runner keeps none."""
        if self.values:
            self.steps.keep((loop.sequences, loop.needs), loop)
        else:
            loop.close()

    def _step(self, key: Any, sampler: Sampler) -> tuple[list[Node], list[Node]]:
        """The nodes of a step: the same lists for each kind, since backends keep what they plan for a list."""
        if key not in self._step_nodes:
            nodes = decode_nodes(self.graph, key[0], self.backend.deterministic, self.backend.activations)
            self._step_nodes[key] = nodes, draw_nodes(sampler.nodes)
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
