"""A node list differentiated: the nodes that compute the gradients of its weights, found by walking it from its end.

    y = f(g(x))     backward: the node of f makes dg from dy, that of g makes dx from dg, each by its op's ``gradient``

A value that several nodes read gets the sum of what they give. A value that is not kept until here is computed again
where it is needed, from values that are (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
arXiv:1604.06174). Nothing is computed in this file: the result is a list of nodes like the model itself, which any
backend runs, captures and plans.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ops import OPS
from ..ops.node import Node
from ..ops.signature import OpError

__all__ = ["RECOMPUTE", "Backward", "gradient_name"]

_POLICIES: Mapping[str, Collection[str]] = {"nothing": (), "cheap": ("cheap",), "layers": ("cheap", "layers")}
RECOMPUTE = tuple(_POLICIES)
"""What the backward pass computes again instead of keeping it: nothing; norms and activations, which cost little; or
all of a layer but the residual stream and what attention gives."""


def gradient_name(value: str) -> str:
    """The name of the array that the gradient of a weight, or of a value that is sliced, is added up in."""
    return f"grad.{value}"


class Backward:
    """Builds the backward nodes of a forward list, a part at a time from its end.

    nodes: what was built so far; arrays: the names of the gradient arrays that the nodes update in place, which have to
    be there when they run.
    """

    def __init__(self, forward: Sequence[Node], trained: Collection[str], recompute: str = "nothing") -> None:
        """forward: all nodes that the values come from; trained: the weights whose gradients are asked for; recompute:
        one of ``RECOMPUTE``."""
        self.nodes: list[Node] = []
        self.arrays: dict[str, None] = {}
        self._policy = _POLICIES[recompute]
        self._maker = {out: node for node in forward for out in node.outs if out not in node.ins}
        self._depends = set(trained)
        for node in forward:
            if self._depends & set(node.ins):
                self._depends.update(node.outs)
        self._gradients: dict[str, str] = {}
        self._in_model_dtype: dict[str, str] = {}
        self._again: dict[str, str] = {}
        self._names: dict[str, int] = {}

    def through(self, nodes: Sequence[Node], loss: str = "") -> None:
        """Go back through a part of the forward list. loss: the name of a loss in it, whose own gradient is 1.

        Raises OpError for an op that has no gradient where a trained weight lies behind it.
        """
        for node in reversed(nodes):
            reached = loss in node.outs or any(out in self._gradients for out in node.outs)
            if not reached or not self._depends & set(node.ins):
                continue
            gradient = OPS[node.op].gradient
            if gradient is None:
                raise OpError(f"node {node}: {node.op} has no gradient, and trained weights lie behind it")
            gradient(_NodeGradient(self, node))
            for out in node.outs:
                self._gradients.pop(out, None)

    # -- what the gradients of ops ask for

    def value(self, name: str) -> str:
        """A value of the forward pass: its name, or that of a copy which is computed again."""
        node = self._maker.get(name)
        if node is None or OPS[node.op].recompute not in self._policy:
            return name
        if name not in self._again:
            ins = tuple(self.value(i) for i in node.ins)
            self._again |= {out: f"{out}.again" for out in node.outs}
            self.nodes.append(Node(node.op, tuple(self._again[out] for out in node.outs), ins, node.attrs))
        return self._again[name]

    def depends(self, name: str) -> bool:
        """Whether a value depends on a weight that is trained, or is one."""
        return name in self._depends

    def gradient(self, name: str) -> str:
        """The gradient of a value."""
        return self._gradients[name]

    def take(self, name: str) -> str:
        """The gradient that a value has so far, which the caller goes on with; "" for none."""
        return self._gradients.pop(name, "")

    def add(self, name: str, gradient: str, in_T: bool) -> None:
        """A gradient of a value, on top of what it has. Slices all give the array that they are placed in."""
        if (before := self._gradients.get(name)) is not None and before != gradient:
            self.nodes.append(Node("add", (total := self.fresh(name),), (before, gradient)))
            gradient = total
        self._gradients[name] = gradient
        if in_T:
            self._in_model_dtype[gradient] = gradient

    def rounded(self, gradient: str) -> str:
        """A gradient in the model's dtype; it is rounded once, however often it is asked for."""
        if gradient not in self._in_model_dtype:
            out = f"{gradient}.T"
            self.nodes.append(Node("cast", (out,), (gradient,), {"U": "T"}))
            self._in_model_dtype[gradient] = out
        return self._in_model_dtype[gradient]

    def fresh(self, value: str) -> str:
        """A new name for a gradient of a value."""
        count = self._names[value] = self._names.get(value, 0) + 1
        return f"d.{value}" if count == 1 else f"d.{value}.{count}"

    def array(self, value: str) -> str:
        """The array that a value's gradient is added up in."""
        name = gradient_name(value)
        self.arrays[name] = None
        return name


@dataclass(frozen=True)
class _NodeGradient:
    """The ``Gradient`` of one node of a ``Backward``."""

    backward: Backward
    node: Node

    @property
    def op(self) -> str:
        return self.node.op

    def _name(self, name: str) -> str:
        """The value of an input or output as the forward list calls it."""
        signature = OPS[self.node.op].signature
        for specs, values in ((signature.ins, self.node.ins), (signature.outs, self.node.outs)):
            for spec, value in zip(specs, values, strict=False):
                if spec.name == name:
                    return value
        return ""

    def __getitem__(self, name: str) -> str:
        return self.backward.value(self._name(name))

    def has(self, name: str) -> bool:
        return self._name(name) != ""

    def attr(self, name: str) -> Any:
        return {**OPS[self.op].signature.defaults, **self.node.attrs}[name]

    def of(self, out: str) -> str:
        return self.backward.gradient(self._name(out))

    def rounded(self, out: str) -> str:
        gradient = self.of(out)
        dtype = next(spec.dtype for spec in OPS[self.op].signature.outs if spec.name == out)
        return self.backward.rounded(gradient) if self.node.attrs.get(dtype, dtype) == "f32" else gradient

    def wants(self, name: str) -> bool:
        return self.backward.depends(self._name(name))

    def so_far(self, name: str) -> str:
        return self.backward.take(self._name(name))

    def into(self, name: str) -> str:
        return self.backward.array(self._name(name))

    def emit(self, op: str, *ins: str, **attrs: Any) -> str:
        out = self.backward.fresh(self.node.ins[0])
        self.update(op, (out,), ins, **attrs)
        return out

    def update(self, op: str, outs: tuple[str, ...], ins: Iterable[str], **attrs: Any) -> None:
        given = list(ins)
        while given and not given[-1]:
            given.pop()
        self.backward.nodes.append(Node(op, outs, tuple(given), attrs))

    def fresh(self, name: str) -> str:
        return self.backward.fresh(self._name(name))

    def give(self, name: str, gradient: str, in_T: bool = False) -> None:
        if self.wants(name):
            self.backward.add(self._name(name), gradient, in_T)
