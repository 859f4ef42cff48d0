"""The node list that updates the weights of a model once their gradients are there."""

from __future__ import annotations

from ..dtypes import Array
from ..ops.node import Node
from .muon import Matrices, matrix_nodes, momentum_node, part_name
from .parameters import Parameters
from .settings import TrainingSettings

__all__ = ["update_nodes", "update_values"]


def update_nodes(settings: TrainingSettings, matrices: Matrices) -> list[Node]:
    """The norm of all gradients; Muon on some matrices; AdamW on the others and on what is not decayed.

    matrices: those that Muon updates. Values: those of ``update_values``; "squares" [1], which the squared norm is
    added to; and "schedule" as the op adamw has it.
    """
    nodes = [
        Node("square_sum", ("norm_squared",), ("g",)),
        Node("add_sum", ("squares",), ("squares", "norm_squared")),
    ]
    if matrices:
        nodes.append(momentum_node("orthogonal", settings.grad_clip))
    for weight, shapes in matrices.items():
        for i, shape in enumerate(shapes):
            nodes += matrix_nodes(part_name(weight, i), *shape, settings.weight_decay)
    for part, decay in (("matrices", settings.weight_decay), ("vectors", 0.0)):
        arrays = tuple(f"{part}.{name}" for name in ("p", "g", "m", "v", "master"))
        attrs = {
            "beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps, "weight_decay": decay,
            "clip": settings.grad_clip,
        }  # fmt: skip
        nodes.append(Node("adamw", arrays, (*arrays, "norm_squared", "schedule"), attrs))
    return nodes


def update_values(parameters: Parameters, matrices: Matrices) -> dict[str, Array]:
    """The arrays that the update changes: "g", all gradients; "matrices.p" and so on, the groups of all flat arrays;
    "0.qkv_proj[1].p" and so on, p, g and master of the matrices that Muon updates."""
    flat = {name: getattr(parameters, name) for name in ("p", "g", "m", "v", "master")}
    found = {f"{group}.{name}": x[cut] for group, cut in parameters.parts.items() for name, x in flat.items()}
    for name in ("p", "g", "master"):
        whole = parameters.views(flat[name])
        for weight, shapes in matrices.items():
            first = 0
            for i, (rows, _) in enumerate(shapes):
                found[f"{part_name(weight, i)}.{name}"] = whole[weight][first : first + rows]
                first += rows
    return {**found, "g": flat["g"]}
