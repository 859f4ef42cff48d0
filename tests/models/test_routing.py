"""Tokens that are near a tie have the experts that transformers' routers give them (tests/golden/routing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.backends import Backend
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.numpy import NumPyBackend
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.graph import decoder
from cuplama.ops.node import Node
from tests.fakes import FakeGpu
from tests.paths import GOLDEN

FILES = sorted((GOLDEN.parent / "routing").glob("*.npz"))


def router_nodes(body: list[Node], given: set[str]) -> list[Node]:
    """The node that chooses experts in the first layer that does, and those before it that it needs. given: names of
    values that are there."""
    at = next(i for i, node in enumerate(body) if node.op.startswith("route"))
    found, needed = [body[at]], set(body[at].ins) - given
    for node in reversed(body[:at]):
        if needed & set(node.outs):
            found.insert(0, node)
            needed = (needed | set(node.ins)) - set(node.outs) - given
    return found


def routed(backend: Backend, case: Path, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Experts and weights [n, k] of rows of what the router reads, float32, experts in ascending order."""
    config = load_config(case)
    weights = {name: backend.load_weight(w) for name, w in load_weights(case, config).items()}
    layer = next(i for i in range(config.num_layers) if f"{i}.router" in weights)
    body = list(decoder(config).body)
    logits = next(node for node in body if node.outs == (f"{layer}.router.out",))
    read = f"{layer}.x" if f"{layer}.router_norm" in weights else logits.ins[0]
    nodes = router_nodes(body, {*weights, read, ""})
    outs = backend.run(nodes, {**weights, read: backend.upload(x)}, nodes[-1].outs)
    experts, share = (backend.download(outs[name]) for name in nodes[-1].outs)
    order = experts.argsort(-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(share, order, -1)


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("where", ["numpy", "emulator"])
def test_tokens_near_a_tie(file: Path, where: str) -> None:
    gpu: Any = FakeGpu(emulate=True) if where == "emulator" else None
    backend: Backend = CudaBackend("f32", gpu=gpu) if gpu is not None else NumPyBackend("f32")
    golden = np.load(file)
    assert len(golden["x"]) >= 40
    experts, weights = routed(backend, GOLDEN / file.stem, golden["x"])
    np.testing.assert_array_equal(experts, golden["experts"])
    np.testing.assert_allclose(weights, golden["weights"], atol=2e-6, rtol=2e-5)


def test_every_model_with_experts_has_a_file() -> None:
    assert {file.stem for file in FILES} == {case.name for case in GOLDEN.iterdir() if load_config(case).experts}
