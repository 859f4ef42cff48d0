"""A node list differentiated: what is refused."""

from __future__ import annotations

import pytest

from cuplama.ops.node import Node
from cuplama.ops.signature import OpError
from cuplama.train.backward import Backward

NODES = [
    Node("linear", ("h",), ("x", "w"), {"U": "f32"}),
    Node("select_rows", ("y",), ("h", "rows")),
    Node(
        "cross_entropy", ("loss", "dlogits"), ("y", "targets", "weights"), {"V": 8, "alpha": 0.0, "first": 0, "U": "T"}
    ),
]


def test_an_op_without_gradient_before_a_trained_weight_is_refused() -> None:
    """Left out, it would leave the weight without a gradient, and nobody would know."""
    with pytest.raises(OpError, match=r"node y = select_rows\(h, rows\): select_rows has no gradient"):
        Backward(NODES, ["w"]).through(NODES, "loss")


def test_one_with_no_trained_weight_behind_it_is_not() -> None:
    backward = Backward(NODES, ["other"])
    backward.through(NODES, "loss")
    assert backward.nodes == []
