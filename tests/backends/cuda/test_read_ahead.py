"""Which launches read what earlier kernels wrote before they wait for them: only where the order of launches allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.folders import source_folder
from cuplama.lab.workloads import case_workload, described_workload
from cuplama.ops import OPS, experts_packed
from cuplama.ops.launch import Device, Launch
from cuplama.ops.node import Node
from cuplama.ops.prototypes import prototype_of
from tests.fakes import FakeGpu, Launcher

N, SLOTS, EXPERTS, WIDTH = 1, 2, 5, 32
ROUTES = ("pairs", "offsets")
SORT = Node("sort_pairs", ROUTES, ("experts",), {"E": EXPERTS})
GATED = Node("expert_linear_silu_mul", ("h",), ("x", "gates", *ROUTES))
COMBINE = Node("expert_linear_combine", ("y",), ("h", "packed", *ROUTES, "weights"))

Aheads = Callable[[Sequence[Node]], list[int]]


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend("bf16", gpu=FakeGpu())


def _values(backend: CudaBackend) -> dict[str, Any]:
    T = DTYPES["bf16"]
    shapes = {"x": (N, WIDTH), "h": (N * SLOTS, WIDTH)}
    found = {name: backend.upload(np.zeros(shape, T)) for name, shape in shapes.items()}
    for name, op in (("gates", "expert_linear_silu_mul"), ("packed", "expert_linear")):
        case = {"n": N, "s": SLOTS, "E": EXPERTS, "m": WIDTH, "k": WIDTH, "b": False, "W": "mxfp4"}
        found[name] = backend.upload(case_workload(OPS[op], case, "bf16").ins[1])
    found["experts"] = backend.upload(np.tile(np.arange(SLOTS, dtype=np.int32), (N, 1)))
    found["weights"] = backend.upload(np.ones((N, SLOTS), np.float32))
    for name, size in (("pairs", N * SLOTS), ("offsets", EXPERTS + 1)):
        found[name] = backend.upload(np.zeros(size, np.int32))
    return found


@pytest.fixture
def aheads(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> Aheads:
    """Runs nodes and tells of each launch that can read ahead whether it does."""
    found: list[int] = []

    def launched(launcher: Launcher, args: tuple[Any, ...]) -> None:
        proto = prototype_of(f"{launcher.file}:{launcher.expression.split('<')[0]}")
        found.extend(int(arg) for p, arg in zip(proto.parameters, args, strict=True) if p.name == "ahead")

    monkeypatch.setattr(Launcher, "_launched", launched)

    def run(nodes: Sequence[Node]) -> list[int]:
        found.clear()
        backend.run(nodes, _values(backend), nodes[-1].outs[:1])
        return found.copy()

    return run


def test_what_an_older_kernel_wrote_is_read_ahead(aheads: Aheads) -> None:
    assert aheads([SORT, GATED, COMBINE]) == [0, 1]  # the gated product itself is behind what chose


def test_reading_ahead_can_be_turned_off(aheads: Aheads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_packed, "AHEAD_ROWS", 0)
    assert aheads([SORT, GATED, COMBINE]) == [0, 0]


def test_what_the_kernel_directly_before_wrote_is_not(aheads: Aheads) -> None:
    assert aheads([SORT, COMBINE]) == [0]
    assert aheads([SORT, GATED, replace(SORT, outs=("pairs2", "offsets")), COMBINE]) == [0, 0]


def test_nothing_is_read_ahead_behind_a_kernel_that_may_start_the_next_before_it_waits(aheads: Aheads) -> None:
    assert aheads([SORT, GATED, Node("add", ("z",), ("weights", "weights")), COMBINE]) == [0, 0]


def test_nothing_is_read_ahead_at_the_beginning(aheads: Aheads, backend: CudaBackend) -> None:
    """What was queued before is not known, also if it was the same list."""
    assert aheads([GATED]) == [0]
    assert aheads([COMBINE]) == [0]
    backend.call(OPS[GATED.op], [_values(backend)[name] for name in GATED.ins], {})
    assert aheads([COMBINE]) == [0]


def _launches() -> Iterator[Launch]:
    for op in OPS.values():
        for case in op.cases:
            for device in (Device(80), Device(90)):
                if op.kernels is not None:
                    yield from op.kernels(described_workload(op, case, "bf16").bind(), device).launches


def _waits_first(kernel: str) -> bool:
    """Whether the text of a kernel names no wait behind where it lets the next one start, or else makes a stream of
    weights, which may do that."""
    file, _, name = kernel.rpartition(":")
    text = re.sub(r"//[^\n]*", "", (source_folder() / file).read_text())
    body = text[re.search(rf"\b{name}\(", text).end() :]  # type: ignore[union-attr]
    body = body[body.index("{") :].partition("\n}\n")[0]
    starts = re.search(r"launch_dependents\(", body) or re.search(r"\bstream\(", body)
    waits = [found.end() for found in re.finditer(r"\b(pdl_)?wait\b", body)]
    return bool(waits) and starts is not None and max(waits) < starts.start()


def test_kernels_that_say_so_wait_before_they_let_the_next_one_start() -> None:
    launches = list(_launches())
    found = {launch.kernel for launch in launches if launch.waits_first}
    assert {kernel.rpartition(":")[2] for kernel in found} == {"expert_linear_packed"}
    assert all(_waits_first(kernel) for kernel in found)
    # What this looks at tells others apart, and no other helper lets the next kernel start.
    assert not _waits_first("linear_mma.cu:linear_mma")
    assert not _waits_first("route.cu:route")
    assert not _waits_first("linear_packed.cu:linear_packed")
    helpers = {p.name for p in source_folder().glob("*.cuh") if "launch_dependents();" in p.read_text()}
    assert {"linear_mma.cuh", "linear_packed.cuh"} <= helpers
    assert not helpers & {"experts.cuh", "mma.cuh", "common.cuh", "linear_packed_sums.cuh", "linear_packed_rows.cuh"}
    assert "if constexpr (!Weights::MORE) launch_dependents();" in (source_folder() / "linear_packed.cuh").read_text()
    assert any(launch.ahead for launch in launches)
    for launch in launches:
        assert launch.constants.get("ahead", 0) == 0
        assert not launch.ahead or "ahead" in launch.constants
