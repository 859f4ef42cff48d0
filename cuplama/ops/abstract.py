"""Shapes and dtypes without arrays: what a list of nodes would compute, found by walking it once.

Memory plans, the kernel inventory and the lab's workloads all come from this walk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import Array, dtype_name
from . import OPS
from .node import Node
from .op import Call, Op

__all__ = ["AbstractArray", "abstract", "attributes", "described_inputs", "infer"]


class _Flags:
    c_contiguous = True


@dataclass(frozen=True)
class AbstractArray:
    """An array's description without the array: enough to bind an op and to plan its launches."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    flags: type[_Flags] = _Flags

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> AbstractArray:
        """Of a run along the first axis."""
        return AbstractArray((len(range(*rows.indices(self.shape[0]))), *self.shape[1:]), self.dtype)


def abstract(shape: Sequence[int], dtype: np.dtype[Any]) -> AbstractArray:
    """The description of an array of that shape and dtype."""
    return AbstractArray(tuple(shape), np.dtype(dtype))


def described_inputs(op: Op, case: Mapping[str, Any], T: np.dtype[Any]) -> list[Array | None]:
    """Descriptions of ``op.random_inputs`` for a case, in the signature's order, without drawing them."""
    found = (op.input_shape(spec, case, T) for spec in op.signature.ins)
    return [None if x is None else abstract(*x) for x in found]


def attributes(op: Op, given: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """What of ``given`` is an attribute of the op, or a letter that no input decides: "T" is the model's dtype."""
    letters = op.parameters.free
    names = {s.name for s in op.signature.attrs} | set(letters)
    return {k: dtype_name(T) if k in letters and v == "T" else v for k, v in given.items() if k in names}


def infer(nodes: Sequence[Node], values: dict[str, Array | None], T: np.dtype[Any]) -> Iterator[tuple[Node, Call]]:
    """Each node with its call: the sizes, dtypes and attributes that follow from ``values``, by name.

    values: weights, inputs and caches, as arrays or descriptions; the outputs of every node are added to it as
    descriptions. T: the model's dtype. Raises OpError for values that do not fit an op.
    """
    values[""] = None  # the name of an input that is left out
    for node in nodes:
        op = OPS[node.op]
        call = op.bind([values[name] for name in node.ins], attributes(op, node.attrs, T))
        for name, spec in zip(node.outs, op.signature.outs, strict=True):
            if spec.name not in op.signature.in_place:
                values[name] = abstract(call.shape(spec), call.dtype(spec))
        yield node, call
