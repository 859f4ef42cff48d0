"""A whole model on a rung: what attention means for the first token, and for the time between two tokens.

The model's graph runs node by node, not fused, and the rung stands in the place of its attention. The product's kernel
runs in the same way, so that nothing else differs. Keys and values of a rung lie in one piece for each head: that is a
cache with a single page of as many tokens as there are.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np

from ...backends import Backend
from ...dtypes import Array
from ...engine.kv_cache import PAGE, pages_for
from ...engine.sequence import SequenceState
from ...errors import ParameterError
from ...model import Model
from ...models.graph import LOGITS
from ...ops import OPS
from ...ops.attention import attention
from ...ops.node import Node, dying, executable
from ...sampling_params import SamplingParams
from ..timing import Spread, seconds
from ..workloads import normal_values
from .rungs import Rung

__all__ = ["LadderPass", "time_pass"]

_SLOW = 2.0  # seconds from which on a pass is timed once
_REPEATS = 10


class LadderPass:
    """The last ``new`` of ``tokens`` tokens through a model, to the logits of the last one.

    A prompt has new = tokens. The keys and values of the tokens before are random, the same for every rung. Raises
    ParameterError for a model with a sliding window, which the rungs do not have.
    """

    def __init__(self, model: Model, rung: Rung, tokens: int, new: int) -> None:
        runner, config = model.engine.runner, model.config
        if any(config.windows):
            raise ParameterError("the rungs of the ladder have no sliding window; this model has one")
        self._backend, self._rung = runner.backend, rung
        nodes = executable([*runner.graph.body, *runner.graph.selected_rows()])
        self._steps = list(zip(nodes, dying(nodes, (LOGITS,)), strict=True))
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.vocab_size, tokens).tolist()
        pages = list(range(pages_for(tokens)))
        params = SamplingParams(seed=0)
        sequence = SequenceState(ids, params, frozenset(), pages=pages, cached=tokens - new)
        batch = runner.batch([(sequence, new)])
        inputs = {name: self._backend.upload(array) for name, array in {**batch.arrays, **batch.tables}.items()}
        shape = (config.num_kv_heads, len(pages) * PAGE, config.head_dim)
        caches = {part: self._arranged(normal_values(rng, shape, self._backend.dtype, 1.0), tokens) for part in "kv"}
        layers = {
            f"{i}.cache.{part}": self._backend.upload(caches[part]) for i in range(config.num_layers) for part in "kv"
        }
        self._values: dict[str, Array | None] = {"": None, **runner.values, **inputs, **layers}

    def _arranged(self, rows: np.ndarray[Any, Any], tokens: int) -> np.ndarray[Any, Any]:
        """Keys or values [H, whole pages, D] as the rung wants them in the cache, [P, H, S, D]."""
        H, _, D = rows.shape
        if self._rung.op is attention:
            return np.ascontiguousarray(rows.reshape(H, -1, PAGE, D).swapaxes(0, 1))
        return np.ascontiguousarray(rows[None, :, :tokens])

    def run(self) -> Array:
        """Queue the pass. Returns the logits, [1, vocab_size] float32."""
        live = dict(self._values)
        for node, dead in self._steps:
            if node.op == attention.name and self._rung.op is not attention:
                outs = self._attend(node, live)
            else:
                outs = self._backend.call(OPS[node.op], [live[name] for name in node.ins], node.attrs)
            live.update(zip(node.outs, outs, strict=True))
            del outs
            for name in dead:
                del live[name]
        logits = live[LOGITS]
        assert logits is not None
        return logits

    def _attend(self, node: Node, live: dict[str, Array | None]) -> tuple[Array, ...]:
        x, k, v = (live[name] for name in node.ins[:3])
        attrs = {name: node.attrs[name] for name in ("num_heads", "scale")}
        width = attrs["num_heads"] * k.shape[3]  # type: ignore[union-attr]
        q: Any = self._backend.zeros((x.shape[0], width), x.dtype)  # type: ignore[union-attr]
        with getattr(self._backend, "gpu", nullcontext()):
            q[...] = x[:, :width]  # type: ignore[index]
            keys, values = k[0], v[0]  # type: ignore[index]
        return self._backend.call(self._rung.op, (q, keys, values), attrs)


def time_pass(backend: Backend, one: LadderPass) -> tuple[np.ndarray[Any, Any], Spread]:
    """(logits, seconds) of the pass, as a captured graph on the device; a slow one once, by the clock of the host."""
    logits: list[Array] = []

    def body() -> None:
        logits.clear()  # the old ones are freed before memory for the new ones is asked for
        logits.append(one.run())

    captured = backend.capture(body)
    try:
        captured.replay().synchronize()  # call by call, which compiles what is missing
        found = backend.download(logits[0])
        began = time.perf_counter()
        captured.replay().synchronize()  # this one captures
        taken = time.perf_counter() - began
        if taken > _SLOW:
            return found, Spread((taken,))
        captured.replay().synchronize()
        return found, seconds(backend, captured.replay, _REPEATS)
    finally:
        captured.close()
