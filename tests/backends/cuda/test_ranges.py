"""NVTX ranges around nodes, calls and replays: in order, with their names, and only where they are asked for."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.ranges import nvtx_ranges
from cuplama.ops import OPS
from cuplama.ops.node import Node
from tests.fakes import FakeGpu

_NODES = [Node("add", ("x1",), ("x0", "x0")), Node("add", ("x2",), ("x1", "x0"))]


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is pushed and popped."""
    found: list[str] = []

    class Range:
        def __init__(self, message: str) -> None:
            self.message = message

        def __enter__(self) -> None:
            found.append(f"+ {self.message}")

        def __exit__(self, *exc: object) -> None:
            found.append(f"- {self.message}")

    monkeypatch.setitem(sys.modules, "cupyx.profiler", SimpleNamespace(time_range=Range))
    monkeypatch.setenv("CUPLAMA_NVTX", "1")
    return found


def _pairs(*names: str) -> list[str]:
    return [mark for name in names for mark in (f"+ {name}", f"- {name}")]


def test_every_node_and_every_call_has_a_range(marks: list[str]) -> None:
    backend = CudaBackend("f32", gpu=FakeGpu())
    x = backend.upload(np.ones((1, 8), np.float32))
    backend.run(_NODES, {"x0": x}, ("x2",))
    backend.call(OPS["add"], (x, x), {})
    assert marks == _pairs("x1 = add(x0, x0)", "x2 = add(x1, x0)", "add")


def test_a_failing_node_ends_its_range(marks: list[str]) -> None:
    gpu = FakeGpu()
    backend = CudaBackend("f32", gpu=gpu)
    x = backend.upload(np.ones((1, 8), np.float32))
    gpu.fail = True
    with pytest.raises(Exception, match="CUDA_ERROR_INVALID_VALUE"):
        backend.run(_NODES, {"x0": x}, ("x2",))
    assert marks == _pairs("x1 = add(x0, x0)")


def test_every_replay_has_a_range(marks: list[str]) -> None:
    backend = CudaBackend("f32", gpu=FakeGpu())
    x = backend.upload(np.ones((1, 8), np.float32))

    def body() -> None:
        backend.run(_NODES[:1], {"x0": x}, ("x1",))

    graph = backend.capture(body)
    for _ in range(3):  # as it is, captured and replayed, replayed
        graph.replay().synchronize()
    node, replay = "x1 = add(x0, x0)", "replay of a captured graph"
    assert marks == _pairs(node, node, replay, replay)


@pytest.mark.parametrize("value", ["", "0"])
def test_without_the_variable_nothing_is_marked(value: str, marks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPLAMA_NVTX", value)
    backend = CudaBackend("f32", gpu=FakeGpu())
    x = backend.upload(np.ones((1, 8), np.float32))
    backend.run(_NODES, {"x0": x}, ("x2",))
    assert nvtx_ranges() is None
    assert marks == []


def test_a_library_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(message: Any) -> None:
        raise RuntimeError("nvtx is not installed")

    monkeypatch.setenv("CUPLAMA_NVTX", "1")
    monkeypatch.setitem(sys.modules, "cupyx.profiler", SimpleNamespace(time_range=missing))
    with caplog.at_level(logging.WARNING, "cuplama"):
        assert nvtx_ranges() is None
    assert caplog.messages == ["CUPLAMA_NVTX: no ranges are marked: nvtx is not installed"]
