"""Passes over batches of one model: their nodes, and the arrays that they read and write, captured where that helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..backends import Backend, CapturedGraph
from ..dtypes import Array
from ..engine.input_buffer import InputBuffer
from ..errors import ParameterError
from ..models.config import ModelConfig
from ..models.rope import RotationTables
from ..ops.node import Node
from .batch import Batch

__all__ = ["Passes", "rotation_tables"]


def rotation_tables(config: ModelConfig, context: int) -> RotationTables:
    """The rotation tables of a model for documents of up to ``context`` tokens.

    Raises ParameterError where the rotation of a token would depend on what comes after it.
    """
    for rope in config.ropes.values():
        if rope.type == "dynamic" and context > rope.context:
            raise ParameterError(
                f"context {context} is more than the {rope.context} from which on dynamic rope changes"
            )
    return RotationTables(config.ropes, context)


class Passes:
    """Runs a node list on batches, whatever their sizes."""

    def __init__(
        self,
        backend: Backend,
        prepare: Callable[[int], tuple[Sequence[Node], Mapping[str, Array]]],
        rotations: RotationTables,
        beside: Passes | None = None,
    ) -> None:
        """prepare: tokens of a batch -> (the list for it, arrays by name that it reads besides the batch's); beside:
        other passes, with which these share their memory: nothing of a pass outlives it."""
        self._backend, self._prepare, self._rotations = backend, prepare, rotations
        self._sharing: list[CapturedGraph] = [] if beside is None else beside._sharing
        self._prepared: dict[int, tuple[Sequence[Node], Mapping[str, Array]]] = {}
        self._ready: dict[tuple[int, int], tuple[InputBuffer, CapturedGraph]] = {}

    def run(self, batch: Batch, **more: np.ndarray[Any, Any]) -> None:
        """Queue a pass. more: inputs besides the batch's, which every batch of the shape has."""
        arrays = {**batch.arrays(self._rotations), **more}
        key = batch.rows, len(batch.bounds)
        if key not in self._ready:
            inputs = InputBuffer(self._backend, arrays)
            # Batches of another number of documents need the same memory.
            graph = self._backend.capture(self._body(batch.rows, inputs), next(iter(self._sharing), None))
            self._ready[key] = inputs, graph
            self._sharing.append(graph)
        inputs, graph = self._ready[key]
        for name, array in arrays.items():
            inputs.host[name][...] = array
        inputs.send()
        graph.replay()

    def _body(self, rows: int, inputs: InputBuffer) -> Callable[[], None]:
        if rows not in self._prepared:
            self._prepared[rows] = self._prepare(rows)
        nodes, values = self._prepared[rows]
        values = {**values, **inputs.device}

        def body() -> None:
            self._backend.run(nodes, values, ())

        return body

    def close(self) -> None:
        """Give back what was captured."""
        for inputs, graph in self._ready.values():
            self._sharing.remove(graph)
            graph.close()
            inputs.close()
        self._ready.clear()
