"""The node list that updates the weights of a model once their gradients are there."""

from __future__ import annotations

from ..ops.node import Node
from .settings import TrainingSettings

__all__ = ["update_nodes"]


def update_nodes(settings: TrainingSettings) -> list[Node]:
    """The norm of all gradients, and AdamW on the matrices and on what is not decayed.

    Values: "g", all gradients, and "squares" [1], which their squared norm is added to; "schedule" as the op adamw has
    it; "matrices.p" and so on, "vectors.p" and so on: the two parts of the flat arrays of ``Parameters``.
    """
    nodes = [
        Node("square_sum", ("norm_squared",), ("g",)),
        Node("add_sum", ("squares",), ("squares", "norm_squared")),
    ]
    for part, decay in (("matrices", settings.weight_decay), ("vectors", 0.0)):
        arrays = tuple(f"{part}.{name}" for name in ("p", "g", "m", "v", "master"))
        attrs = {
            "beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps, "weight_decay": decay,
            "clip": settings.grad_clip,
        }  # fmt: skip
        nodes.append(Node("adamw", arrays, (*arrays, "norm_squared", "schedule"), attrs))
    return nodes
