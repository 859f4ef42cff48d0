"""What an op's gradient is written with: the nodes that compute the gradients of its inputs.

The chain rule, node by node. An op's ``gradient`` is a function of one ``Gradient``: it asks for the values of its node
by their names in the signature, and for the gradients of its outputs, and emits nodes that make the gradients of its
inputs. It runs no numbers: what it emits is data, like the model. cuplama/train/backward.py goes through a node list
from its end with it.

    def _silu_mul_gradient(g: Gradient) -> None:
        g.give("x", g.emit("silu_mul_backward", g["x"], g.of("y")))

Gradients have the shape and dtype of the value, with one exception: those of weights are summed up in float32, in
arrays that are there before the pass (``into``), because a weight may be used twice and a step may have several passes.
"""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Gradient"]


class Gradient(Protocol):
    """One node's part of a backward pass. Names are those of the op's signature; what comes back names values."""

    @property
    def op(self) -> str:
        """The node's op."""

    def __getitem__(self, name: str) -> str:
        """The value of an input or output of the node; "" for an input that is left out."""

    def has(self, name: str) -> bool:
        """Whether the op has such an input, and the node gives it."""

    def attr(self, name: str) -> Any:
        """An attribute of the node."""

    def of(self, out: str) -> str:
        """The gradient of an output."""

    def rounded(self, out: str) -> str:
        """The gradient of an output in T, the model's dtype, where the output itself may be float32."""

    def wants(self, name: str) -> bool:
        """Whether the gradient of an input is asked for: of a weight that is trained, or of what depends on one."""

    def so_far(self, name: str) -> str:
        """The gradient that an input has from nodes behind this one, "" for none. Who asks for it adds to it."""

    def into(self, name: str) -> str:
        """The float32 array that a weight's gradient is added to, in place."""

    def emit(self, op: str, *ins: str, **attrs: Any) -> str:
        """Append a node of one output that is a new value; its name."""

    def update(self, op: str, outs: tuple[str, ...], ins: tuple[str, ...], **attrs: Any) -> None:
        """Append a node whose outputs have names already: arrays that are changed in place, or names from ``fresh``."""

    def fresh(self, name: str) -> str:
        """A new name for the gradient of an input, for ``update``."""

    def give(self, name: str, gradient: str, in_T: bool = False) -> None:
        """Say what the gradient of an input is. in_T: it has the model's dtype, though the input is float32."""
