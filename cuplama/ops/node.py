"""A node of a graph: one op applied to named values. When the values of a list of nodes die is told here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import OPS

__all__ = ["Node", "dying", "executable"]


@dataclass(frozen=True)
class Node:
    """One op applied to named values. An out that is also an in is updated in place.

    parts: the nodes that a fused node stands for.
    """

    op: str
    outs: tuple[str, ...]
    ins: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Node, ...] = ()

    def __str__(self) -> str:
        return self.text(str)

    def text(self, shown: Callable[[str], str]) -> str:
        """The node as a line; ``shown`` says how a value's name is written, outs first."""
        attrs = "".join(f" {k}={v:g}" if isinstance(v, float) else f" {k}={v}" for k, v in self.attrs.items())
        return f"{', '.join(map(shown, self.outs))} = {self.op}({', '.join(map(shown, self.ins))}){attrs}"


def executable(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each one whose op has no kernel replaced by the parts that it stands for."""
    found: list[Node] = []
    for node in nodes:
        op = OPS.get(node.op)
        found += executable(node.parts) if node.parts and (op is None or op.kernels is None) else [node]
    return found


def dying(nodes: Sequence[Node], keep: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """For each node the values that nothing uses after it.

    Only values that the list itself makes can die: weights, inputs and what is updated in place stay. So do the values
    in ``keep``.
    """
    made = {name for node in nodes for name in node.outs if name not in node.ins}
    last = {name: i for i, node in enumerate(nodes) for name in (*node.ins, *node.outs)}
    return [
        tuple(n for n in dict.fromkeys((*node.ins, *node.outs)) if n in made and last[n] == i and n not in keep)
        for i, node in enumerate(nodes)
    ]
