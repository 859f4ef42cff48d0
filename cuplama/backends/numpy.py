"""The reference backend: every op is its NumPy reference. It needs no GPU and defines what is right."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array
from ..ops import OPS
from ..ops.node import Node, dying
from ..ops.op import Op
from ..ops.team import LEAST_WORK, fill, team_of
from ..quant.format import plain_format
from ..quant.rtn import Rounded
from ..quant.stored import Stored
from ..quant.weight import Weight
from .blas import one_blas_thread

__all__ = ["NumPyBackend"]


@dataclass(frozen=True)
class _Prepared:
    """A node made ready to run: what to call, and what dies after it."""

    reference: Callable[..., Any]
    ins: tuple[str, ...]
    outs: tuple[tuple[str, np.dtype[Any] | None], ...]
    attrs: Mapping[str, Any]
    dead: tuple[str, ...]


class _CapturedGraph:
    """A graph that is the body itself; it is done as soon as it is queued."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body

    def replay(self) -> _CapturedGraph:
        self._body()
        return self

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        del self._body


@dataclass(frozen=True)
class _Fetched:
    """Copies that were made at once."""

    arrays: list[np.ndarray[Any, Any]]

    def wait(self) -> list[np.ndarray[Any, Any]]:
        return self.arrays


class NumPyBackend:
    """The ``Backend`` of the CPU. It runs in float32 whatever the checkpoint's dtype, unless another is asked for.

    convert: whether weights are converted to the dtype once, at load, quantised ones as well; otherwise they stay in
    the mapped file and are converted at every use, some rows at a time, which is slow but lets a large model run in
    little memory.
    """

    name = "numpy"
    activations = "auto"
    deterministic = False  # The sums of OpenBLAS depend on how many rows a product has.
    forks = True
    prefill_chunk = 512
    compile_seconds = 0.0
    captures = False  # It would gain nothing. ``capture`` works all the same: tests use it to run what a GPU captures.

    def __init__(self, dtype: str = "f32", convert: bool = True) -> None:
        self.dtype = DTYPES[dtype]
        self._convert = convert
        self._prepared: dict[tuple[int, tuple[str, ...]], tuple[Sequence[Node], list[_Prepared]]] = {}

    def describe(self) -> str:
        return f"NumPy {np.__version__} on {os.cpu_count()} CPU cores, {self.dtype.name}"

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        return array

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def fetch(self, arrays: Sequence[Array]) -> _Fetched:
        return _Fetched([np.array(a) for a in arrays])

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.zeros(shape, dtype)

    def transpose(self, array: Array) -> Array:
        return np.ascontiguousarray(array.T)

    def load_weight(self, weight: Weight) -> Array:
        if not self._convert:
            return _settled(weight).stored(self.dtype) if weight.packed else weight.mapped()
        array = np.empty(weight.shape, weight.device_dtype(self.dtype))
        if weight.packed:
            _decode(weight, array)
            return array
        flat = array.reshape(-1)
        for offset, chunk in weight.chunks(1 << 24):
            flat[offset : offset + chunk.size] = chunk
        return array

    def end_loading(self) -> None:
        pass

    def call(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> tuple[Array, ...]:
        out = op.reference(*ins, **attrs)
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(map(_cast, outs, self._dtypes(op, attrs)))

    def run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        # What overflows in float16 shows in the logits; the sampler refuses those.
        with one_blas_thread() as threads, team_of(threads), np.errstate(over="ignore", invalid="ignore"):
            return self._run(nodes, values, keep)

    def _run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        values = {"": None, **values}
        for ready in self._prepare(nodes, keep):
            out = ready.reference(*[values[name] for name in ready.ins], **ready.attrs)
            for (name, dtype), array in zip(ready.outs, out if isinstance(out, tuple) else (out,), strict=True):
                values[name] = _cast(array, dtype)
            for name in ready.dead:
                del values[name]
        return {name: values[name] for name in keep}

    def capture(self, body: Callable[[], None], sharing: object = None) -> _CapturedGraph:
        return _CapturedGraph(body)

    def host_ring(self, shape: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Array]:
        ring = np.zeros(shape, np.int32)
        return ring, ring

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        array[...] = host

    def copy(self, array: Array, source: Array) -> None:
        array[...] = source

    def when_short_of_memory(self, give_back: Callable[[], None]) -> None:
        pass

    def close(self) -> None:
        self._prepared.clear()

    def _dtypes(self, op: Op, attrs: Mapping[str, Any]) -> list[np.dtype[Any] | None]:
        """What each output is to be; None for one that keeps its own, as the cache does (``C``)."""
        letters = [attrs.get(spec.dtype, spec.dtype) for spec in op.signature.outs]
        return [self.dtype if letter == "T" else DTYPES.get(letter) for letter in letters]

    def _prepare(self, nodes: Sequence[Node], keep: Sequence[str]) -> list[_Prepared]:
        """The nodes of a list made ready; worked out once per list."""
        key = id(nodes), tuple(keep)
        known = self._prepared.get(key)
        if known is not None and known[0] is nodes:
            return known[1]
        ready = [
            _Prepared(
                OPS[node.op].reference,
                node.ins,
                tuple(zip(node.outs, self._dtypes(OPS[node.op], node.attrs), strict=True)),
                node.attrs,
                dead,
            )
            for node, dead in zip(nodes, dying(nodes, keep), strict=True)
        ]
        self._prepared[key] = (nodes, ready)
        return ready


def _settled(weight: Weight) -> Weight:
    """The weight, whose parts are not quantised again each time they are read."""
    with np.errstate(over="ignore", invalid="ignore"):
        return replace(weight, parts=tuple(p.settled() if isinstance(p, Rounded) else p for p in weight.parts))


def _cast(array: Array, dtype: np.dtype[Any] | None) -> Array:
    return array if dtype is None else array.astype(dtype, copy=False)


_DECODED = 1 << 18  # numbers that a thread decodes at a time: what it makes on the way stays in its cache


def _decode(weight: Weight, array: np.ndarray[Any, Any]) -> None:
    """The numbers of a weight with quantised parts into ``array``, by as many threads as passes have."""
    outs, pieces, first = list[Array](), list[Callable[[], Array]](), 0
    array = array.reshape(-1, array.shape[-1])  # experts one below the other
    for part in weight.parts:
        count = max(1, _DECODED // max(1, part.shape[1]))
        for at in range(0, len(part), count):
            rows = slice(at, min(at + count, len(part)))
            outs.append(array[first + rows.start : first + rows.stop])
            pieces.append(partial(_numbers, part, rows))
        first += len(part)
    with one_blas_thread() as threads, team_of(threads):
        fill(outs, pieces, LEAST_WORK)


def _numbers(part: np.ndarray[Any, Any] | Stored, rows: slice) -> np.ndarray[Any, Any]:
    found = part[rows]
    with np.errstate(over="ignore", invalid="ignore"):  # of a thread's own; damage shows in the logits
        return found.numbers() if isinstance(found, Stored) else plain_format(found.dtype).decode(found)
