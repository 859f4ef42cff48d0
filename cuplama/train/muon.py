"""The nodes of Muon: the step of a matrix is its momentum, made orthogonal.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024). Of
the momentum, U S V^T by its singular values, the step is about U V^T: all directions count alike. An odd polynomial of
the matrix, applied five times, brings its singular values near 1, and takes products of matrices alone. The step is
0.2 sqrt(max(rows, columns)) times that, so that its elements are as large as AdamW's, and learning rate and weight
decay mean the same for both (Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models.config import ModelConfig
from ..ops.node import Node
from ..ops.signature import dim_value

__all__ = ["Matrices", "layer_matrices", "matrix_nodes", "momentum_node", "part_name"]

Matrices = Mapping[str, Sequence[tuple[int, int]]]
"""Canonical weight -> (rows, columns) of each matrix that is stacked in it, from the top."""

_BETA = 0.95  # of the momentum, which is Nesterov's
_ITERATIONS = 5
# x <- a x + b (x x^T) x + c (x x^T)^2 x. Singular values s end between 0.68 and 1.14 if they begin between 0.01 and 1.
_A, _B, _C = 3.4445, -4.775, 2.0315
# Weights that hold several matrices, whatever a checkpoint calls them: rows of each.
_STACKED = {"qkv_proj": ("num_heads*D", "num_kv_heads*D", "num_kv_heads*D"), "gate_up_proj": ("f", "f")}


def layer_matrices(config: ModelConfig) -> Matrices:
    """The matrices of a model's layers, without embeddings and head, and without adapters."""
    found = {}
    for name, shape in config.weight_shapes().items():
        layer, _, module = name.partition(".")
        if layer.isdigit() and "." not in module and len(shape) == 2:
            dims = config.dims(name)
            rows = [dim_value(part, dims) for part in _STACKED.get(module, ())] or [shape[0]]
            found[name] = [(r, shape[1]) for r in rows]
    return found


def part_name(weight: str, part: int) -> str:
    """What the values of a matrix are named after: it is the part-th of a weight."""
    return f"{weight}[{part}]"


def momentum_node(group: str, clip: float) -> Node:
    """The momentum of all matrices at once: ``group.g`` becomes what is to be made orthogonal."""
    arrays = (f"{group}.g", f"{group}.m")
    return Node("muon_momentum", arrays, (*arrays, "norm_squared"), {"beta": _BETA, "clip": clip})


def matrix_nodes(name: str, rows: int, columns: int, weight_decay: float) -> list[Node]:
    """The step of a matrix, whose values are ``name.p``, ``name.g`` and ``name.master``.

    The products are as wide as its shorter side: a matrix with more rows than columns is transposed for them. a I is
    added to the other two terms, so that the iteration is one product with x: x <- (a I + b A + c A A) x, A = x x^T.
    """
    short, long = sorted((rows, columns))
    x = f"{name}.x0"
    nodes = [Node("muon_normalise", (x,), (f"{name}.g",), {"rows": short, "columns": long, "U": "T"})]
    for i in range(_ITERATIONS):
        square, fourth, polynomial, after = (f"{name}.{value}{i}" for value in ("square", "fourth", "polynomial", "y"))
        nodes += [
            Node("linear", (square,), (x, x), {"U": "T"}),
            Node("linear", (fourth,), (square, square), {"U": "T"}),
            Node("muon_polynomial", (polynomial,), (square, fourth), {"diagonal": _A, "alpha": _B, "beta": _C}),
            Node("linear_backward_x", (after,), (polynomial, x)),
        ]
        x = after
    arrays = tuple(f"{name}.{array}" for array in ("p", "g", "master"))
    ins = (*arrays, x, "norm_squared", "schedule")
    return [*nodes, Node("muon_update", arrays, ins, {"weight_decay": weight_decay})]
