"""What the linear layers of a model are given: a text runs through the model's own graph, one layer at a time.

No more than one layer's weights are on the device. Between the layers the residual stream of all samples is in host
memory, or in a file that has no name where it is large.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from ..engine.batch import Batch
from ..engine.input_buffer import InputBuffer
from ..engine.kv_cache import PagedCache, pages_for
from ..engine.sequence import SequenceState
from ..errors import DeviceError, PromptError
from ..models.config import ModelConfig
from ..models.graph import Graph, decoder
from ..models.rope import RotationTables
from ..ops import OPS
from ..ops.node import Node
from ..quant.gptq import Matrix
from ..sampling_params import SamplingParams
from ..text.tokenizer import Tokenizer

__all__ = ["Calibration", "samples_of"]

_MAX_BYTES = 2 << 30  # of the residual stream in memory
_MAX_CHARACTERS = 16  # of a long text that are read for each token of a sample; a token of prose has about 4


def samples_of(text: str, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """``count`` samples of ``length`` tokens from all over a text, or as many as it has. Raises PromptError for none.

    Each begins as a text of the model does: with its BOS, if it has one.
    """
    some = text[:100]
    begin, plain = tokenizer.encode(some), tokenizer.encode(some, bos=False)
    begin = begin[: len(begin) - len(plain)] if begin[len(begin) - len(plain) :] == plain else []
    begin = begin if len(begin) < length else []
    step, stretch = length - len(begin), len(text) // count
    if stretch > _MAX_CHARACTERS * length:  # so much is not needed
        starts = [text.find(" ", i * stretch, (i + 1) * stretch) + 1 or i * stretch for i in range(count)]
        ids = [tokenizer.encode(text[s : s + _MAX_CHARACTERS * length], bos=False)[:step] for s in starts]
        return [begin + some_ids for some_ids in ids if some_ids]
    every = tokenizer.encode(text, bos=False)
    if not every:
        raise PromptError("the calibration text has no tokens")
    whole = max(1, len(every) // step)
    chosen = np.unique(np.linspace(0, whole - 1, min(count, whole)).round().astype(int))
    return [begin + every[i * step : (i + 1) * step] for i in chosen]


class Calibration:
    """Samples on their way through the layers of a model. x: the residual stream, float32 [tokens, d]."""

    def __init__(self, backend: Backend, config: ModelConfig, samples: Sequence[Sequence[int]], spill: Path) -> None:
        """spill: a folder with room for the residual stream, should it be large."""
        self.backend = backend
        longest = max(map(len, samples))
        each = max(1, backend.prefill_chunk // longest)  # samples of a pass
        # The cache of one layer: each layer runs over all samples before the next one does.
        self._cache = PagedCache(backend, replace(config, layers=config.layers[:1]), each * pages_for(longest))
        rotations = RotationTables(config.ropes, longest)
        self._tables = {name: backend.upload(table) for name, table in rotations.arrays.items()}
        self._passes = [self._batch(samples[i : i + each], rotations) for i in range(0, len(samples), each)]
        graph = decoder(config)
        self._streams, ((self._embed,), *self._layers) = graph.streams, _cut(graph)
        self.x = _array((sum(map(len, samples)), config.hidden_size), spill)

    def _batch(self, samples: Sequence[Sequence[int]], rotations: RotationTables) -> Batch:
        self._cache.clear()
        parts = []
        for tokens in samples:
            sequence = SequenceState(tokens, SamplingParams(seed=0), frozenset())
            self._cache.extend(sequence.pages, len(tokens))
            parts.append((sequence, len(tokens)))
        return Batch.build(parts, rotations, self._cache.padding_page)

    def embed(self, weights: Mapping[str, Array]) -> None:
        """Fill the residual stream with the embeddings of the samples. weights: on the device, by canonical name."""
        for rows, found in self._run(self._embed, "", self._streams[0], weights):
            self.x[rows] = self.backend.download(found)

    def hessian(self, layer: int, weight: str, weights: Mapping[str, Array]) -> Matrix:
        """x^T x of the inputs x [tokens, k] of a matrix, float64 [k, k]. weights: the layer's, as of ``embed``.

        Raises DeviceError for inputs that are not finite.
        """
        nodes = next(n for n in self._layers[layer] if n[-1].op == "linear" and n[-1].ins[1] == weight)
        given, backend = nodes[-1].ins[0], self.backend
        total: Array | None = None
        for _, x in self._run(nodes, self._streams[layer], given, weights):
            columns = backend.transpose(x)
            (product,) = backend.call(OPS["linear"], (columns, columns), {"U": "f32"})
            total = product if total is None else backend.call(OPS["add"], (total, product), {})[0]
        assert total is not None
        found = backend.download(total).astype(np.float64)
        if not np.isfinite(found).all():
            raise DeviceError(f"the calibration's inputs of {weight} are not finite in {backend.dtype.name}")
        return found

    def advance(self, layer: int, weights: Mapping[str, Array]) -> None:
        """Run the layer: the residual stream becomes that behind it. weights: as of ``hessian``."""
        before, behind = self._streams[layer : layer + 2]
        for rows, out in self._run(self._layers[layer][-1], before, behind, weights):
            self.x[rows] = self.backend.download(out)

    def _run(
        self, nodes: Sequence[Node], x: str, wanted: str, weights: Mapping[str, Array]
    ) -> Iterator[tuple[slice, Array]]:
        """Run nodes over all samples: the rows of each pass, and the value that is wanted of it. x: the name of the
        residual stream, or "" for nodes that do not read it."""
        (layer,) = {name.partition(".cache.")[0] for node in nodes for name in node.ins if ".cache." in name} or {""}
        cache = {f"{layer}.cache.{part}": self._cache.arrays[f"0.cache.{part}"] for part in "kv"}
        at = 0
        for batch in self._passes:
            rows = slice(at, at + batch.rows)
            inputs = InputBuffer(self.backend, {**batch.arrays, **batch.tables}).device
            stream = {x: self.backend.upload(self.x[rows])} if x else {}
            values = {**weights, **cache, **self._tables, **inputs, **stream}
            yield rows, self.backend.run(nodes, values, (wanted,))[wanted]
            at += batch.rows


def _cut(graph: Graph) -> list[list[list[Node]]]:
    """Of what embeds, and of each layer, the nodes up to each linear one, and all of them.

    Backends keep what they plan for a list.
    """
    parts: list[list[list[Node]]] = []
    begin = 0
    for stream in graph.streams:
        end = next(i for i, node in enumerate(graph.body) if stream in node.outs) + 1
        nodes = list(graph.body[begin:end])
        parts.append([nodes[: i + 1] for i, node in enumerate(nodes) if node.op == "linear"] + [nodes])
        begin = end
    return parts


def _array(shape: tuple[int, int], spill: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """An array in memory, or if it is large in a file that goes when nobody uses it."""
    if 4 * shape[0] * shape[1] <= _MAX_BYTES:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=spill) as file:
        file.truncate(4 * shape[0] * shape[1])
        return np.memmap(file, np.float32, "r+", shape=shape)
